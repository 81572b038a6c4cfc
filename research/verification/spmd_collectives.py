"""What torch's collectives do to the types of spmd_types: which they take, and which they leave behind.

R: equal on every rank, each with a part of the gradient. I: equal, each with the whole gradient. V: every rank its own.
P: every rank a summand. Our code calls `torch.distributed` by name, so its functions are replaced for the time of a check.
"""
# MERGED-DOC """A type error in the words of the code under test: what was done to what, why that does not fit, on which line, in which modules."""
# MERGED-DOC """Recomputation under the type checker: the second run of a block, inside the backward pass, is checked like the first.
# MERGED-DOC
# MERGED-DOC Autograd runs it without the checker's modes, on inputs that it has saved and that have lost their types.
# MERGED-DOC """

import functools
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import spmd_types as spmd
import torch
import torch.distributed as dist
from spmd_types import I, P, R, V
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.overrides import _get_current_function_mode_stack  # as torch.utils.checkpoint itself asks for it

from models import recompute
from parallel import collectives
from research import ROOT

CHECKING = ("spmd_check", "spmd_collectives", "spmd_functions")
HERE = Path(__file__).resolve().parent
CHECKER = {str(HERE / f"{name}.py") for name in CHECKING}
CHECKER |= {str(ROOT / "parallel" / "collectives.py")}
"""Files that stand in a stack because they check; and parallel/collectives.py: it is its caller's choice of a pair that fits or not."""
LIBRARIES = ("<", *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))


class TypeMismatch(Exception):
    """Raised where it happens: the stack says `source`, file:line of the code under test, and `modules`, innermost first.

    `at`: the line, where it is not the one at hand; "" for what has none.
    """

    def __init__(self, what: str, why: str, at: str | None = None) -> None:
        super().__init__(f"{what}: {why}")
        self.what, self.why, self.source = what, why, source() if at is None else at
        selves = (frame.f_locals.get("self") for frame in _frames())
        self.modules = [found for found in selves if isinstance(found, nn.Module)]


def source() -> str:
    """file:line of the innermost frame that belongs to the code under test."""
    return next((f"{frame.f_code.co_filename}:{frame.f_lineno}" for frame in _frames() if _is_under_test(frame.f_code.co_filename)), "")


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_under_test(file: str) -> bool:
    return file not in CHECKER and not file.startswith(LIBRARIES)


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
    raise TypeMismatch(name, "has no rule in research/verification/spmd_collectives.py")


def _take(tensors: list[Tensor], allowed: tuple, axes: list[spmd.MeshAxis], collective: str) -> None:
    """Raises where a collective is given something that it makes no sense of."""
    for tensor in tensors:
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise TypeMismatch(collective, "outside an autograd function it leaves the gradient as it is")
        for found in (spmd.get_local_type(tensor).get(axis) for axis in axes):
            if found not in allowed:
                raise TypeMismatch(collective, f"takes {' or '.join(kind.value for kind in allowed)}, not {found and found.value}")


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


@contextmanager
def typed_recompute() -> Iterator[None]:
    """Inside, what models/recompute.py runs again is typed again."""
    with mock.patch.object(recompute, "checkpoint", _twice_checked(recompute.checkpoint)):
        yield


def _twice_checked(checkpoint: Callable) -> Callable:
    def run(forward: Callable, *inputs: Any, **settings: Any) -> Any:
        modes = _get_current_function_mode_stack()
        types = [spmd.get_local_type(x) if isinstance(x, Tensor) else None for x in inputs]

        def either(*given: Any) -> Any:
            if _get_current_function_mode_stack():
                return forward(*given)
            for x, known in zip(given, types, strict=True):
                if isinstance(x, Tensor) and not spmd.has_local_type(x):
                    spmd.assert_type(x, known)
            with ExitStack() as again:
                for mode in modes:
                    again.enter_context(mode)
                return forward(*given)

        return checkpoint(either, *inputs, **settings)

    return run
