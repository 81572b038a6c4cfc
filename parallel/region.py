"""How activations enter and leave a sliced region, with and without sequence parallelism.

Inside a sliced region each tensor rank holds its own features of all positions. Outside, every rank holds the same whole
activations (`TensorParallelRegion`), or only its own positions of them (`SequenceParallelRegion`, arXiv:2205.05198), which divides
their memory by the tensor degree.
"""

from torch import Tensor
from torch.distributed import ProcessGroup

from parallel.collectives import copy_to_tensor_ranks, gather_sequence, reduce_from_tensor_ranks, reduce_scatter_sequence
from parallel.grid import Grid


class TensorParallelRegion:
    """Outside a sliced region x is 'b s d', equal on every tensor rank. f and g of arXiv:1909.08053."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    @property
    def partial_group(self) -> ProcessGroup | None:
        """Ranks over which the gradient of a parameter used outside sliced regions is summed: None, since each rank has all of it."""
        return None

    def enter(self, x: Tensor) -> Tensor:
        """'b s d' -> 'b s d', equal on every rank; the gradients of the ranks' slices are summed."""
        return copy_to_tensor_ranks(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """'b s d' of partial sums -> 'b s d', their total, equal on every rank."""
        return reduce_from_tensor_ranks(x, self.group)

    def first_position(self, x: Tensor) -> int:
        """The position in the sequence of x[:, 0] outside a sliced region. Modules ask models.token_positions.TokenPositions."""
        return 0

    def first_token(self, x: Tensor) -> Tensor:
        """'b s d' outside a sliced region -> 'b d' at position 0, equal on every rank, for a computation that is the same on all."""
        return x[:, 0]


class SequenceParallelRegion(TensorParallelRegion):
    """Outside a sliced region x is 'b s/tp d', this rank's positions. g and ḡ of arXiv:2205.05198.

    A block gathers twice and reduce-scatters twice in the forward pass, and again in the backward pass: on a ring each rank sends
    8·b·s·h·(t−1)/t elements, as many as without sequence parallelism, plus one all-reduce of h for each norm's weight and bias and
    each row bias. The two gathered inputs are kept for the weight gradients; the paper gathers them again in the backward pass and
    sends 10·b·s·h·(t−1)/t, to keep 2·b·s·h·(1−1/t) elements less.
    """

    @property
    def partial_group(self) -> ProcessGroup | None:
        """All tensor ranks, since each has the gradient of its own positions only."""
        return self.group

    def enter(self, x: Tensor) -> Tensor:
        """'b s/tp d' -> 'b s d', equal on every rank; each rank gets the summed gradient of its positions."""
        return gather_sequence(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """'b s d' of partial sums -> 'b s/tp d', the total at this rank's positions."""
        return reduce_scatter_sequence(x, self.group)

    def first_position(self, x: Tensor) -> int:
        """The position in the sequence of x[:, 0] outside a sliced region."""
        return 0 if self.group is None else self.group.rank() * x.shape[1]

    def first_token(self, x: Tensor) -> Tensor:
        """'b s/tp d' -> 'b d' of rank 0's first position, equal on every rank; rank 0 alone gets the gradient, which all of them have."""
        here = 1.0 if self.first_position(x) == 0 else 0.0
        return reduce_from_tensor_ranks(x[:, 0] * here, self.group)


def region_of(grid: Grid) -> TensorParallelRegion:
    """The region of modules that are sliced over this grid's tensor ranks."""
    return (SequenceParallelRegion if grid.sequence else TensorParallelRegion)(grid.tensor_group)
