"""A decoder on several tensor ranks, led by the first: what is called there, the others call too.

So whatever decides (sampling, batches, a server) runs on one rank and needs to know of no other.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.distributed import ProcessGroup

from models.decoder import Decoder
from parallel.orders import hear, tell

ADMIT, STEP, DROP, REORDER, CLEAR, LEAVE = range(6)


class Leader(Decoder):
    """The decoder of tensor rank 0. The other ranks are in `follow` until `release`."""

    @property
    def group(self) -> ProcessGroup:
        """The tensor ranks."""
        assert self.grid.tensor_group is not None
        return self.grid.tensor_group

    def admit(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """As Decoder's, on all ranks."""
        tell([[ADMIT], *prompts], self.group)
        return super().admit(prompts)

    def step(self, ids: Sequence[int]) -> Tensor:
        """As Decoder's, on all ranks."""
        tell([[STEP], ids], self.group)
        return super().step(ids)

    def drop(self, row: int) -> None:
        """As Decoder's, on all ranks."""
        tell([[DROP], [row]], self.group)
        super().drop(row)

    def reorder(self, parents: Sequence[int]) -> None:
        """As Decoder's, on all ranks."""
        tell([[REORDER], parents], self.group)
        super().reorder(parents)

    def clear(self) -> None:
        """As Decoder's, on all ranks."""
        tell([[CLEAR]], self.group)
        super().clear()

    def release(self) -> None:
        """Lets the other ranks go. The last call."""
        tell([[LEAVE]], self.group)


def follow(decoder: Decoder) -> None:
    """Carries out on a tensor rank > 0 what the first one's Leader is asked, until it lets go."""
    assert decoder.grid.tensor_group is not None
    while True:
        (order, *_), *lists = hear(decoder.grid.tensor_group)
        if order == ADMIT:
            decoder.admit(lists)
        elif order == STEP:
            decoder.step(lists[0])
        elif order == DROP:
            decoder.drop(lists[0][0])
        elif order == REORDER:
            decoder.reorder(lists[0])
        elif order == CLEAR:
            decoder.clear()
        else:
            return
