"""The rules of torch's collectives for spmd_types: which types they accept, and which types their results have.

R: equal on every rank, each rank with a part of the gradient. I: equal, each rank with the whole gradient. V: different on every rank.
P: a summand on every rank. Our code calls `torch.distributed` by name, so its functions are replaced while a check runs. `typed_recompute`
does the same for activation recomputation. A type error is a `TypeMismatch`, which describes the code under test.
"""

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

EQUAL, SUMMANDS = (I, R), (P, V)
"""Types that are the same on every rank; types that may be summed over ranks (a product of two V tensors is V, and meant as P)."""
WITHOUT_RULE = (
    *("all_gather_coalesced", "all_gather_into_tensor", "all_reduce_coalesced", "all_to_all", "all_to_all_single", "batch_isend_irecv"),
    *("broadcast", "gather", "irecv", "isend", "recv", "reduce", "reduce_scatter_tensor", "scatter", "send"),
)
"""Collectives that our models do not call. A variant that calls one is refused, not ignored."""
CHECKING = ("spmd_check", "spmd_collectives", "spmd_functions")
HERE = Path(__file__).resolve().parent
CHECKER = {str(HERE / f"{name}.py") for name in CHECKING} | {str(ROOT / "parallel" / "collectives.py")}
"""Files that are not the code under test: the checker itself, and parallel/collectives.py, whose caller chooses the conjugate pair."""
LIBRARIES = ("<", *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))


class TypeMismatch(Exception):
    """A type error. `what` is the operation, `why` the reason.

    `source` is file:line of the code under test, and `modules` are the modules that were running, innermost first. Both are read from the
    stack where the exception is made. `at` replaces the line; it is "" for an error that has no line.
    """

    def __init__(self, what: str, why: str, at: str | None = None) -> None:
        super().__init__(f"{what}: {why}")
        self.what, self.why, self.source = what, why, source() if at is None else at
        owners = (frame.f_locals.get("self") for frame in _frames())
        self.modules = [owner for owner in owners if isinstance(owner, nn.Module)]


def source() -> str:
    """file:line of the innermost frame that belongs to the code under test."""
    for frame in _frames():
        file = frame.f_code.co_filename
        if file not in CHECKER and not file.startswith(LIBRARIES):
            return f"{file}:{frame.f_lineno}"
    return ""


def _frames() -> Iterator[FrameType]:
    """The frames of the caller and its callers, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


@contextmanager
def typed_collectives() -> Iterator[None]:
    """A context in which the collectives that our code uses check and set types whenever the checker is on. The others are refused."""
    rules: dict[str, Callable] = {"all_reduce": _all_reduce, "all_gather": _all_gather, "reduce_scatter": _reduce_scatter}
    rules |= {"all_gather_single": _all_gather_single, "reduce_scatter_single": _reduce_scatter_single}
    rules |= {name: functools.partial(_refuse, name) for name in WITHOUT_RULE}

    def while_checking(run: Callable, rule: Callable) -> Callable:
        def call(*arguments: Any, **settings: Any) -> Any:
            return rule(run, *arguments, **settings) if spmd.is_type_checking() else run(*arguments, **settings)

        return call

    with ExitStack() as replaced:
        for name, rule in rules.items():
            replaced.enter_context(mock.patch.object(dist, name, while_checking(getattr(dist, name), rule)))
        replaced.enter_context(mock.patch.object(collectives, "own_piece", while_checking(collectives.own_piece, _own_piece)))
        yield


@contextmanager
def typed_recompute() -> Iterator[None]:
    """A context in which blocks that models/recompute.py runs again, inside the backward pass, are checked again.

    Autograd runs them without the checker's modes, on saved inputs that have lost their types. Both are restored.
    """

    def twice_checked(checkpoint: Callable) -> Callable:
        def run(forward: Callable, *inputs: Any, **settings: Any) -> Any:
            modes = _get_current_function_mode_stack()
            context = [setting for setting in settings.values() if isinstance(setting, Tensor)]
            types = [spmd.get_local_type(x) if isinstance(x, Tensor) else None for x in (*inputs, *context)]

            def first_or_again(*arguments: Any, **context: Any) -> Any:
                if _get_current_function_mode_stack():  # the first time
                    return forward(*arguments, **context)
                for x, known in zip((*arguments, *context.values()), types, strict=True):
                    if isinstance(x, Tensor) and not spmd.has_local_type(x):
                        spmd.assert_type(x, known)
                with ExitStack() as again:
                    for mode in modes:
                        again.enter_context(mode)
                    return forward(*arguments, **context)

            return checkpoint(first_or_again, *inputs, **settings)

        return run

    with mock.patch.object(recompute, "checkpoint", twice_checked(recompute.checkpoint)):
        yield


def axes_of(group: ProcessGroup | None) -> list[spmd.MeshAxis]:
    """The axes of the current mesh that a group spans. None is the whole world."""
    whole = spmd.MeshAxis.of(group or dist.group.WORLD)
    return [axis for axis in spmd.current_mesh() if axis <= whole]


def _refuse(name: str, run: Callable, *arguments: Any, **settings: Any) -> None:
    raise TypeMismatch(name, "has no rule in research/verification/spmd_collectives.py")


def _take(tensors: list[Tensor], allowed: tuple, axes: list[spmd.MeshAxis], collective: str) -> None:
    """Raises if a collective is given a tensor of a type that it does not accept, or one whose gradient it would leave unchanged."""
    for tensor in tensors:
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise TypeMismatch(collective, "outside an autograd function it leaves the gradient as it is")
        for kind in (spmd.get_local_type(tensor).get(axis) for axis in axes):
            if kind not in allowed:
                raise TypeMismatch(collective, f"takes {' or '.join(accepted.value for accepted in allowed)}, not {kind and kind.value}")


def _become(tensors: list[Tensor], like: Tensor, kind: spmd.PerMeshAxisLocalSpmdType, axes: list[spmd.MeshAxis]) -> None:
    """Types what a collective wrote: `kind` along the axes of its group, the type of its input `like` along the others."""
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


def _all_gather_single(run, output, tensor, group=None, async_op=False):
    return _all_gather(lambda outputs, *rest: run(outputs[0], *rest), [output], tensor, group, async_op)


def _reduce_scatter(run, output, pieces, op=dist.ReduceOp.SUM, group=None, async_op=False):
    axes = axes_of(group)
    _take(pieces, SUMMANDS, axes, "reduce_scatter")
    with spmd.no_typecheck():
        done = run(output, pieces, op, group, async_op)
    _become([output], pieces[0], V, axes)
    return done


def _reduce_scatter_single(run, output, tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
    return _reduce_scatter(lambda own, inputs, *rest: run(own, inputs[0], *rest), output, [tensor], op, group, async_op)


def _own_piece(run, x, group, dim):
    axes = axes_of(group)
    _take([x], EQUAL, axes, "a split over ranks")
    piece = run(x, group, dim)
    _become([piece], x, V, axes)
    return piece
