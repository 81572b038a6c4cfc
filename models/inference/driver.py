"""A decoder on several tensor ranks, led by the first: what is called there, the others call too.

So whatever decides (sampling, batches, a server) runs on one rank and needs to know of no other.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.distributed import ProcessGroup

from models.inference.decoder import Decoder
from models.inference.scoring import TokenScorer
from parallel.object_collectives import broadcast_ints, receive_ints

ADMIT, STEP, DROP, REORDER, CLEAR, LEAVE = range(6)


class DriverDecoder(Decoder):
    """The decoder of tensor rank 0. The other ranks are in `follow` until `release`."""

    @property
    def group(self) -> ProcessGroup:
        """The tensor ranks."""
        assert self.grid.tensor_group is not None
        return self.grid.tensor_group

    def admit(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """As Decoder's, on all ranks."""
        broadcast_ints([[ADMIT], *prompts], self.group)
        return super().admit(prompts)

    def step(self, ids: Sequence[int]) -> Tensor:
        """As Decoder's, on all ranks."""
        broadcast_ints([[STEP], ids], self.group)
        return super().step(ids)

    def drop(self, row: int) -> None:
        """As Decoder's, on all ranks."""
        broadcast_ints([[DROP], [row]], self.group)
        super().drop(row)

    def reorder(self, parents: Sequence[int]) -> None:
        """As Decoder's, on all ranks."""
        broadcast_ints([[REORDER], parents], self.group)
        super().reorder(parents)

    def clear(self) -> None:
        """As Decoder's, on all ranks."""
        broadcast_ints([[CLEAR]], self.group)
        super().clear()

    def release(self) -> None:
        """Lets the other ranks go. The last call."""
        broadcast_ints([[LEAVE]], self.group)


def run_worker(decoder: Decoder) -> None:
    """Carries out on a tensor rank > 0 what the first one's Leader is asked, until it lets go."""
    assert decoder.grid.tensor_group is not None
    while True:
        (order, *_), *lists = receive_ints(decoder.grid.tensor_group)
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


SCORE, LEAVE_SCORING = range(2)


class DriverScorer(TokenScorer):
    """Those of tensor rank 0. The other ranks are in `follow_scores` until `release`."""

    @property
    def group(self) -> ProcessGroup:
        """The tensor ranks."""
        assert self.grid.tensor_group is not None
        return self.grid.tensor_group

    def score(self, rows: Sequence[Sequence[int]], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As Scores', on all ranks."""
        broadcast_ints([[SCORE], counts, *rows], self.group)
        return super().score(rows, counts)

    def release(self) -> None:
        """Lets the other ranks go. The last call."""
        broadcast_ints([[LEAVE_SCORING]], self.group)


def run_scoring_worker(scores: TokenScorer) -> None:
    """Carries out on a tensor rank > 0 what the first one's leader is asked, until it lets go."""
    assert scores.grid.tensor_group is not None
    while True:
        (order, *_), *lists = receive_ints(scores.grid.tensor_group)
        if order == LEAVE_SCORING:
            return
        counts, *rows = lists
        scores.score(rows, counts)
