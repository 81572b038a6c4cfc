"""Differentiable collectives in conjugate pairs: one runs forward, the other backward (arXiv:1909.08053, arXiv:2205.05198).

Every function takes its process group; over None (an axis of one rank) it returns its argument. No collective writes a tensor
that autograd owns: the reduction in place is always done on a fresh copy. All are blocking calls on the current stream, so that
NCCL orders them after the kernel that produced their input; NCCL itself was not run.

An all-gather receives into one tensor instead of a list, which saves a copy and changes no bit. A reduce-scatter does so on GPUs only:
gloo adds a list and a tensor in different orders on more than two ranks, and results on CPUs must stay what they were.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Collective = Callable[[Tensor, ProcessGroup], Tensor]


def identity(x: Tensor, group: ProcessGroup) -> Tensor:
    """Returns the same tensor."""
    return x


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """Σ over ranks, equal on every rank of the group; any shape."""
    y = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(y, group=group)
    return y


def all_gather(dim: int) -> Collective:
    """Every rank's tensor concatenated along `dim` in rank order, equal on every rank: '… n …' -> '… (tp n) …'."""

    def gather(x: Tensor, group: ProcessGroup) -> Tensor:
        received = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
        dist.all_gather_single(received, x.contiguous(), group=group)
        along = dim % x.dim()
        pieces = received.unflatten(0, (group.size(), -1))  # tp …
        return pieces.movedim(0, along).flatten(along, along + 1).contiguous()

    return gather


def reduce_scatter(dim: int) -> Collective:
    """Σ over ranks; each rank keeps its piece along `dim`: '… (tp n) …' -> '… n …'."""

    def reduce(x: Tensor, group: ProcessGroup) -> Tensor:
        return sum_of_own_piece(_equal_pieces(x, group.size(), dim), group, as_one=x.is_cuda)

    return reduce


def sum_of_own_piece(pieces: Sequence[Tensor], group: ProcessGroup, as_one: bool) -> Tensor:
    """Σ over ranks of pieces[own rank]. `as_one`: the pieces are sent as one tensor, not as a list."""
    mine = torch.empty_like(pieces[0], memory_format=torch.contiguous_format)
    if as_one:
        dist.reduce_scatter_single(mine, torch.cat(list(pieces)), group=group)
    else:
        dist.reduce_scatter(mine, [piece.contiguous() for piece in pieces], group=group)
    return mine


def split(dim: int) -> Collective:
    """This rank's piece along `dim` of a tensor equal on every rank: '… (tp n) …' -> '… n …'."""
    return lambda x, group: own_piece(x, group, dim)


def own_piece(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's piece of a tensor equal on every rank, cut evenly along `dim`: '… (tp n) …' -> '… n …'."""
    return _equal_pieces(x, group.size(), dim)[group.rank()].contiguous()


def _equal_pieces(x: Tensor, degree: int, dim: int) -> tuple[Tensor, ...]:
    """torch.chunk alone would give the last rank less, or nothing, and the collective would hang."""
    if x.shape[dim] % degree:
        raise ValueError(f"{degree} ranks do not divide {x.shape[dim]}, dim {dim} of {tuple(x.shape)}")
    return x.chunk(degree, dim)


def conjugate(forward: Collective, backward: Collective) -> Callable[[Tensor, ProcessGroup | None], Tensor]:
    """A differentiable collective: `forward` on the input, `backward` on the gradient."""

    class Pair(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, group):
            ctx.group = group
            # A view, not x itself: autograd must see an output of its own even where nothing is computed.
            return forward(x, group).view_as(x) if forward is identity else forward(x, group)

        @staticmethod
        def backward(ctx, gradient):
            return backward(gradient, ctx.group), None

    return lambda x, group: x if group is None else Pair.apply(x, group)


copy_to_tensor_ranks = conjugate(identity, all_reduce)
"""f of arXiv:1909.08053: enters a sliced region. x equal on all ranks; its gradients are summed."""

reduce_from_tensor_ranks = conjugate(all_reduce, identity)
"""g of arXiv:1909.08053: leaves a sliced region. Partial sums in, their total, equal on all ranks, out."""

gather_from_tensor_ranks = conjugate(all_gather(-1), split(-1))
"""'… n' -> '… (tp n)': sliced features joined. The gradient must be equal on all ranks; each takes its part."""

scatter_to_tensor_ranks = conjugate(split(-1), all_gather(-1))
"""'… (tp n)' -> '… n': each rank takes its features; the gradients are joined."""

gather_shared = conjugate(all_gather(-1), reduce_scatter(-1))
"""'… n' -> '… (c n)': features that every rank of the group uses for a computation of its own; their gradients are summed."""

gather_sequence = conjugate(all_gather(1), reduce_scatter(1))
"""g of arXiv:2205.05198, 'b s/tp d' -> 'b s d': enters a sliced region; every rank's gradient of the whole is summed."""

reduce_scatter_sequence = conjugate(reduce_scatter(1), all_gather(1))
"""ḡ of arXiv:2205.05198, 'b s d' -> 'b s/tp d': leaves a sliced region; partial sums in, this rank's positions out."""

scatter_sequence = conjugate(split(1), all_gather(1))
"""'b s d' -> 'b s/tp d': each rank takes its positions of a tensor that is equal on all ranks."""

join_sequence = conjugate(all_gather(1), split(1))
"""'b s/tp d' -> 'b s d' for a replicated consumer: the gradient is equal on all ranks; each takes its positions."""
