"""What torch's collectives do to the types of spmd_types: which they take, and which they leave behind.

R: equal on every rank, each with a part of the gradient. I: equal, each with the whole gradient. V: every rank its own.
P: every rank a summand. Our code calls `torch.distributed` by name, so its functions are replaced for the time of a check.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import spmd_types as spmd
import torch
import torch.distributed as dist
from spmd_types import I, P, R, V
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel import collectives
from research.misfit import Misfit

EQUAL, SUMMANDS = (I, R), (P, V)
"""What is the same on every rank; what may be added up over them (a product of two V tensors is V, and meant as P)."""


WITHOUT_RULE = (
    *("all_gather_coalesced", "all_gather_into_tensor", "all_gather_single", "all_reduce_coalesced", "all_to_all", "all_to_all_single"),
    *("batch_isend_irecv", "broadcast", "gather", "irecv", "isend", "recv", "reduce", "reduce_scatter_single", "reduce_scatter_tensor"),
    *("scatter", "send"),
)
"""Nothing of ours calls them inside a model. A variant that does is told, not waved through."""


@contextmanager
def typed_collectives() -> Iterator[None]:
    """Inside, and wherever the checker is on, the collectives that our code uses check and set types; the others are refused."""
    rules: dict[str, Callable] = {"all_reduce": _all_reduce, "all_gather": _all_gather, "reduce_scatter": _reduce_scatter}
    rules |= {name: functools.partial(_refuse, name) for name in WITHOUT_RULE}
    with ExitStack() as replaced:
        for name, rule in rules.items():
            replaced.enter_context(mock.patch.object(dist, name, _while_checking(getattr(dist, name), rule)))
        replaced.enter_context(mock.patch.object(collectives, "own_piece", _while_checking(collectives.own_piece, _own_piece)))
        yield


def axes_of(group: ProcessGroup | None) -> list[spmd.MeshAxis]:
    """The axes of the current mesh that a group runs along; None is the whole world."""
    whole = spmd.MeshAxis.of(group or dist.group.WORLD)
    return [axis for axis in spmd.current_mesh() if axis <= whole]


def _while_checking(run: Callable, rule: Callable) -> Callable:
    """`run`, through `rule` while the checker is on."""

    def call(*arguments: Any, **settings: Any) -> Any:
        return rule(run, *arguments, **settings) if spmd.is_type_checking() else run(*arguments, **settings)

    return call


def _refuse(name: str, run: Callable, *arguments: Any, **settings: Any) -> None:
    raise Misfit(name, "has no rule in research/typed_collectives.py")


def _take(tensors: list[Tensor], allowed: tuple, axes: list[spmd.MeshAxis], collective: str) -> None:
    """Raises where a collective is given something that it makes no sense of."""
    for tensor in tensors:
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise Misfit(collective, "outside an autograd function it leaves the gradient as it is")
        for found in (spmd.get_local_type(tensor).get(axis) for axis in axes):
            if found not in allowed:
                raise Misfit(collective, f"takes {' or '.join(kind.value for kind in allowed)}, not {found and found.value}")


def _become(tensors: list[Tensor], like: Tensor, kind: spmd.PerMeshAxisLocalSpmdType, axes: list[spmd.MeshAxis]) -> None:
    """What a collective wrote: `kind` along the axes of its group, as what went in along the others, whatever was there before."""
    types = spmd.get_local_type(like) | dict.fromkeys(axes, kind)
    for tensor in tensors:
        spmd.mutate_type(tensor, src=dict(spmd.get_local_type(tensor)), dst=types)


def _all_reduce(run, tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
    axes, adds = axes_of(group), op == dist.ReduceOp.SUM
    _take([tensor], SUMMANDS if adds else (V, *EQUAL), axes, "all_reduce" if adds else "all_reduce of a maximum")
    with spmd.no_typecheck():
        done = run(tensor, op, group, async_op)
    _become([tensor], tensor, I, axes)
    return done


def _all_gather(run, pieces, tensor, group=None, async_op=False):
    axes = axes_of(group)
    _take([tensor], (V,), axes, "all_gather")
    with spmd.no_typecheck():
        done = run(pieces, tensor, group, async_op)
    _become(pieces, tensor, I, axes)
    return done


def _reduce_scatter(run, output, pieces, op=dist.ReduceOp.SUM, group=None, async_op=False):
    axes = axes_of(group)
    _take(pieces, SUMMANDS, axes, "reduce_scatter")
    with spmd.no_typecheck():
        done = run(output, pieces, op, group, async_op)
    _become([output], pieces[0], V, axes)
    return done


def _own_piece(run, x, group, dim):
    axes = axes_of(group)
    _take([x], EQUAL, axes, "a split over ranks")
    piece = run(x, group, dim)
    _become([piece], x, V, axes)
    return piece
