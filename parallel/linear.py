"""ColumnParallelLinear and RowParallelLinear, the two halves of Megatron's sliced MLP and attention (arXiv:1909.08053, §3)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from parallel.collectives import copy_to_tensor_ranks
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.region import region_of
from parallel.slices import Slice, make_parameter, slice_of

Draw = Callable[[str, tuple[int, ...]], Tensor]
"""(logical name, full shape) -> the whole parameter as drawn, the same on every rank and every layout."""


def zeros(name: str, shape: tuple[int, ...]) -> Tensor:
    """The initial value of every bias."""
    return torch.zeros(shape)


def refuse_uneven(sizes: tuple[int, ...], grid: Grid, name: str) -> None:
    """Raises a Mistake if the tensor degree does not divide a part: a sliced linear layer holds equal pieces."""
    for size in sizes:
        if size % grid.tensor:
            raise Mistake(f"parallel.tensor = {grid.tensor} does not divide {size}, the sliced size of {name}")


class ColumnParallelLinear(nn.Module):
    """y = x Aᵀ + b with A cut by output rows: rank i holds A_i and b_i and returns y_i = x A_iᵀ + b_i.

    x: '... d_in', equal on every tensor rank  ->  y: '... d_out/tp', this rank's features of each part.
    Backward: x's gradient, Σ_i g_i A_i, is all-reduced, so it is equal on every rank again.

    `parts` are the sizes of fused outputs (q, k, v or gate, up), each of which is cut separately; y holds this rank's piece of each, in
    that order.
    """

    product = staticmethod(F.linear)
    """(x, weight, bias) -> x weightᵀ + bias. models/inference/packed_weights.py replaces it for inference."""

    def __init__(self, name: str, in_features: int, parts: tuple[int, ...], bias: bool, draw: Draw, grid: Grid) -> None:
        super().__init__()
        refuse_uneven(parts, grid, name)
        self.region = region_of(grid)
        self.parts = tuple(part // grid.tensor for part in parts)
        rows = sum(parts)
        self.weight = _parameter(f"{name}.weight", Slice((rows, in_features), 0, parts), draw, grid)
        self.bias = _parameter(f"{name}.bias", Slice((rows,), 0, parts), zeros, grid) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """'b s d_in' ('b s/tp d_in' under sequence parallelism) -> 'b s d_out/tp'."""
        return self.product(self.region.enter(x), self.weight, self.bias)

    def extra_repr(self) -> str:
        """The cut, e.g. `[576, 192] cut along dim 0 in parts [192, 192, 192]`."""
        return str(slice_of(self.weight))


class RowParallelLinear(nn.Module):
    """y = x Aᵀ + b with A cut by input columns: rank i holds A_i, and y = Σ_i x_i A_iᵀ + b.

    x: '... d_in/tp', this rank's features  ->  y: '... d_out', equal on every tensor rank.
    The bias is replicated and added once, after the sum. Backward: every rank has the whole gradient of y.
    """

    product = staticmethod(F.linear)
    """See ColumnParallelLinear.product."""

    def __init__(self, name: str, in_features: int, out_features: int, bias: bool, draw: Draw, grid: Grid) -> None:
        super().__init__()
        refuse_uneven((in_features,), grid, name)
        self.region = region_of(grid)
        self.weight = _parameter(f"{name}.weight", Slice((out_features, in_features), 1, (in_features,)), draw, grid)
        self.bias = _parameter(f"{name}.bias", Slice((out_features,)), zeros, grid) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """'b s d_in/tp' -> 'b s d_out' ('b s/tp d_out' under sequence parallelism)."""
        if self.region.group is None:
            return self.product(x, self.weight, self.bias)
        y = self.region.leave(self.product(x, self.weight, None))
        return y if self.bias is None else y + copy_to_tensor_ranks(self.bias, self.region.partial_group)

    def extra_repr(self) -> str:
        """The cut, e.g. `[192, 768] cut along dim 1`."""
        return str(slice_of(self.weight))


class ReplicatedLinear(nn.Module):
    """y = x Aᵀ + b with A whole on every tensor rank. '... d_in' -> '... d_out'.

    Where each tensor rank has other places of the sequence, the gradients on one rank are only part of the whole gradients, and are
    summed over the ranks of `partial_group`. It is None where all ranks have the same x.
    """

    def __init__(self, name: str, in_features: int, out_features: int, draw: Draw, partial_group: ProcessGroup | None) -> None:
        super().__init__()
        self.partial_group = partial_group
        self.weight = _parameter(f"{name}.weight", Slice((out_features, in_features)), draw, Grid())
        self.bias = _parameter(f"{name}.bias", Slice((out_features,)), zeros, Grid())

    def forward(self, x: Tensor) -> Tensor:
        """'... d_in' -> '... d_out'."""
        return F.linear(x, *(copy_to_tensor_ranks(part, self.partial_group) for part in (self.weight, self.bias)))

    def extra_repr(self) -> str:
        """E.g. `[192, 192] on every rank`."""
        return str(slice_of(self.weight))


def _parameter(name: str, cut: Slice, draw: Draw, grid: Grid) -> nn.Parameter:
    return make_parameter(name, draw(name, cut.shape), cut, grid.tensor_rank, grid.tensor)
