"""How a parameter is sliced over tensor ranks: `Slice` says which rows of the whole each rank holds, as intervals.

The same description is used to cut a freshly drawn tensor, to join the ranks' pieces for a checkpoint, and to read a part of a
file at another layout. It is pure arithmetic; no process group is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Region:
    """`length` rows from row `whole` of the logical parameter lie at row `local` of this rank's piece."""

    whole: int
    local: int
    length: int


@dataclass(frozen=True)
class Slice:
    """A logical parameter's full shape and its cut.

    `dim` is the cut dimension, None for a parameter that every tensor rank holds whole. `parts` are the sizes, along `dim`, of
    the parts that are cut separately: a fused q/k/v weight has three, so that each rank holds *its* q, k and v rows. A part that
    the degree does not divide is padded at the end (vocabulary tables only).
    """

    shape: tuple[int, ...]
    dim: int | None = None
    parts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.dim is not None and not 0 <= self.dim < len(self.shape):
            raise ValueError(f"dim {self.dim} is not one of {self.shape}")
        if self.dim is not None and sum(self.parts) != self.shape[self.dim]:
            raise ValueError(f"parts {self.parts} do not add up to {self.shape[self.dim]}, dim {self.dim} of {self.shape}")

    def regions(self, rank: int, degree: int) -> list[Region]:
        """The rows along `dim` that `rank` of `degree` holds, in local order. Padding is in no region."""
        regions, whole, local = [], 0, 0
        for part in self.parts:
            share = -(-part // degree)
            length = max(0, min(part - rank * share, share))
            if length:
                regions.append(Region(whole + rank * share, local, length))
            whole, local = whole + part, local + share
        return regions

    def local_shape(self, degree: int) -> tuple[int, ...]:
        """The shape of one rank's piece, padding included; the same on every rank."""
        if self.dim is None:
            return self.shape
        rows = sum(-(-part // degree) for part in self.parts)
        return (*self.shape[: self.dim], rows, *self.shape[self.dim + 1 :])

    def cut(self, full: Tensor, rank: int, degree: int) -> Tensor:
        """This rank's piece of the whole parameter, padding zero. A copy."""
        if tuple(full.shape) != self.shape:
            raise ValueError(f"a parameter of shape {self.shape} cannot be cut from a tensor of shape {tuple(full.shape)}")
        if self.dim is None:
            return full.clone()
        piece = full.new_zeros(self.local_shape(degree))
        for region in self.regions(rank, degree):
            piece.narrow(self.dim, region.local, region.length).copy_(full.narrow(self.dim, region.whole, region.length))
        return piece

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole parameter from the pieces of all tensor ranks in rank order; padding is dropped."""
        for piece in pieces:
            if tuple(piece.shape) != self.local_shape(len(pieces)):
                raise ValueError(
                    f"a piece of {self} on {len(pieces)} ranks has shape {self.local_shape(len(pieces))}, not {tuple(piece.shape)}"
                )
        if self.dim is None:
            return pieces[0].clone()
        full = pieces[0].new_empty(self.shape)
        for rank, piece in enumerate(pieces):
            for region in self.regions(rank, len(pieces)):
                full.narrow(self.dim, region.whole, region.length).copy_(piece.narrow(self.dim, region.local, region.length))
        return full

    def __str__(self) -> str:
        if self.dim is None:
            return f"{list(self.shape)} on every rank"
        return f"{list(self.shape)} cut along dim {self.dim}" + (f" in parts {list(self.parts)}" if len(self.parts) > 1 else "")


def slice_of(parameter: Tensor) -> Slice:
    """The Slice that `make_parameter` left on a parameter."""
    return parameter.slice


def logical_name(parameter: Tensor) -> str:
    """The layout-free name, e.g. `blocks.3.attention.qkv.weight`."""
    return parameter.logical_name


def make_parameter(name: str, full: Tensor, cut: Slice, rank: int, degree: int) -> nn.Parameter:
    """This rank's piece of `full` as a parameter with the attributes `logical_name` and `slice`.

    DeepSpeed's gradient norm reads the attribute `tensor_model_parallel`. It is set on parameters that are really sliced only:
    those without it are counted on tensor rank 0 alone.
    """
    parameter = nn.Parameter(cut.cut(full, rank, degree))
    parameter.logical_name = name
    parameter.slice = cut
    if cut.dim is not None and degree > 1:
        parameter.tensor_model_parallel = True
    return parameter


def gathered(piece: Tensor, cut: Slice, group: "torch.distributed.ProcessGroup | None") -> Tensor:
    """The whole logical parameter on every rank of the tensor group. Collective over `group`."""
    if group is None:
        return cut.join([piece])
    received = piece.new_empty((group.size() * piece.shape[0], *piece.shape[1:]))
    torch.distributed.all_gather_single(received, piece.contiguous(), group=group)
    return cut.join(received.chunk(group.size()))
