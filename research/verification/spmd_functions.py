"""Finds the types of an autograd function by running it: its forward on typed tensors, then its backward on a typed gradient.

Nothing is declared about our conjugate pairs and cross entropy. Whether the result of the forward is equal on every rank, different on
every rank, or a summand follows from the collectives in it (research/verification/spmd_collectives.py). Whether an equal result has the
whole gradient on every rank (I) or a part (R) follows from the backward: the type is the one with which the backward gives every input the
gradient that the input's type demands.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import spmd_types as spmd
import torch
from spmd_types import I, P, R, V
from torch import Tensor
from torch.overrides import TorchFunctionMode

from research.verification.spmd_collectives import EQUAL, TypeMismatch, source

Types = dict[Any, Any]
"""Mesh axis -> R, I, V or P."""
SERVES = {I: EQUAL, R: EQUAL, P: (P, V), V: (V, R)}
"""The type that a gradient must have -> the types that are accepted for it inside a function, where no gradient flows. I and R are the
same numbers there, V is meant as a summand, and a constant (R) may be used as a piece. A total over ranks (I) may not."""
UNWRITTEN = (torch.empty, torch.empty_like, torch.Tensor.new_empty)
"""Functions that make buffers. A buffer counts as a constant until something is written into it."""


class TypeFinder(TorchFunctionMode):
    """Types autograd functions by running them, and turns the checker's errors into TypeMismatch. Used on top of the checker's own mode."""

    scalar_source = ""
    """file:line that made the last scalar with a gradient, which is the loss."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not spmd.is_type_checking():
            return func(*args, **kwargs)
        if func in UNWRITTEN:
            with spmd.no_typecheck():
                return spmd.assert_type(func(*args, **kwargs), R)

        # `func` may be the `apply` of an autograd function. Those for which the checker has rules are left to it.
        owner = getattr(func, "__self__", None)
        autograd = isinstance(owner, type) and issubclass(owner, torch.autograd.Function) and not hasattr(owner, "spmd_typecheck")
        function = owner if autograd and func.__name__ == "apply" else None
        try:
            result = self._apply(function, args) if function else func(*args, **kwargs)
        except spmd.SpmdTypeError as error:
            operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            raise TypeMismatch(_call(function or func, operands), _reason(error, operands)) from None

        if func is torch.Tensor.__setitem__:
            _written(args[0], args[-1])
        if isinstance(result, Tensor) and result.ndim == 0 and result.requires_grad:
            self.scalar_source = source()
        return result

    def _apply(self, function: type[torch.autograd.Function], arguments: tuple) -> Tensor:
        """Runs the function on every reading of its arguments and every type of its result, until one gives the right gradients."""
        mismatches: list[TypeMismatch] = []
        for reading in _readings(arguments):
            context = Context(tuple(isinstance(a, Tensor) and a.requires_grad for a in arguments))
            try:
                result = self._forward(function, context, reading)
            except TypeMismatch as mismatch:
                mismatches.append(mismatch)
                continue
            # A result that is equal along an axis may be I or R there; the type that the forward gave is tried first.
            types = spmd.get_local_type(result)
            choices = [(kind, *(other for other in EQUAL if other is not kind)) if kind in EQUAL else (kind,) for kind in types.values()]
            for chosen in itertools.product(*choices):
                chosen_types = dict(zip(types, chosen, strict=True))
                try:
                    self._check_gradients(function, context, reading, result, chosen_types)
                except TypeMismatch as mismatch:
                    mismatches.append(mismatch)
                    continue
                with spmd.no_typecheck():
                    recorded = _Recorded.apply(function, context, [result.detach()], *arguments)
                return spmd.assert_type(recorded, chosen_types)
        raise mismatches[0]

    def _forward(self, function: Any, context: "Context", arguments: tuple) -> Tensor:
        with torch.no_grad(), self:
            if function.setup_context is torch.autograd.Function.setup_context:
                result = function.forward(context, *arguments)
            else:
                result = function.forward(*arguments)
                function.setup_context(context, arguments, result)
        if not isinstance(result, Tensor):
            raise TypeMismatch(function.__name__, "returns more than one tensor, and types are found for one")
        return result

    def _check_gradients(self, function: Any, context: "Context", arguments: tuple, result: Tensor, types: Types) -> None:
        """Raises if a result of these types leaves an input without the gradient that the input's type demands."""
        with spmd.no_typecheck():
            gradient = torch.zeros_like(result)
        spmd.assert_type(gradient, {axis: kind.backward_type() for axis, kind in types.items()})
        with torch.no_grad(), self:
            gradients = _tuple(function.backward(context, gradient))
        for needed, x, x_gradient in zip(context.needs_input_grad, arguments, gradients, strict=True):
            for axis, kind in spmd.get_local_type(x).items() if needed and x_gradient is not None else ():
                demanded, gives = kind.backward_type(), spmd.get_local_type(x_gradient).get(axis)
                if gives not in SERVES[demanded]:
                    why = f"the gradient of its {kind.value} input must be {demanded.value}, its backward gives {gives and gives.value}"
                    raise TypeMismatch(_call(function, [a for a in arguments if isinstance(a, Tensor)]), why)


class Context:
    """A replacement for autograd's context: the saved tensors come back unchanged, with their types."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Does nothing: types do not depend on it."""

    def set_materialize_grads(self, value: bool) -> None:
        """Does nothing: the gradient always exists."""


class _Recorded(torch.autograd.Function):
    """The function's node in autograd's graph. It returns the result that was checked; its backward is the function's own, unchecked."""

    @staticmethod
    def forward(ctx, function, context, result, *arguments):
        ctx.function, ctx.context = function, context
        return result[0]

    @staticmethod
    def backward(ctx, gradient):
        with spmd.no_typecheck():
            return None, None, None, *_tuple(ctx.function.backward(ctx.context, gradient))


def _readings(arguments: tuple) -> Iterator[tuple]:
    """The arguments, with aliases for tensors: first typed as they are, then with V read as P where a gradient is wanted."""
    tensors = [(i, a) for i, a in enumerate(arguments) if isinstance(a, Tensor)]
    places = [(i, axis) for i, a in tensors if a.requires_grad for axis, kind in spmd.get_local_type(a).items() if kind is V]
    for as_summand in itertools.product((False, True), repeat=len(places)):
        summands = list(itertools.compress(places, as_summand))
        aliases = {}
        for i, tensor in tensors:
            with spmd.no_typecheck():
                alias = tensor.detach()
            aliases[i] = spmd.assert_type(alias, spmd.get_local_type(tensor) | {axis: P for j, axis in summands if j == i})
        yield tuple(aliases.get(i, a) for i, a in enumerate(arguments))


def _written(buffer: Tensor, value: object) -> None:
    """Types `buffer[…] = value`, which the checker does not: a buffer into which a rank writes its own values is its own afterwards."""
    for axis, kind in spmd.get_local_type(value).items() if isinstance(value, Tensor) else ():
        before = spmd.get_local_type(buffer).get(axis)
        if before in EQUAL and kind not in EQUAL:
            spmd.mutate_type(buffer, axis, src=before, dst=kind)


def _tuple(gradients: Any) -> tuple:
    return gradients if isinstance(gradients, tuple) else (gradients,)


def _call(func: Callable, operands: list[Tensor]) -> str:
    """The call as text: `linear(V, V blocks.0.mlp.up.weight, I)`."""
    return f"{getattr(func, '__name__', func)}({', '.join(f'{_kinds(x)} {_name(x)}'.strip() for x in operands)})"


def _reason(error: spmd.SpmdTypeError, operands: list[Tensor]) -> str:
    """The first sentence of the checker's error, without the axis (there is only one), and the tensors whose gradient it is about."""
    sentence = re.sub(r" on axis \S+", "", str(error).splitlines()[0]).partition(" Found types")[0].rstrip(".")
    invariant = [_name(x) or "the I operand" for x in operands if "I" in _kinds(x)]
    return f"{sentence}: the gradient of {' and '.join(invariant)} is left partial" if sentence.startswith("Invariant") else sentence


def _kinds(x: Tensor) -> str:
    """The types along each axis, the outer first: R, I, V or P; ? if none is known."""
    types = spmd.get_local_type(x)
    return "".join(dict.fromkeys(types[axis].value for axis in spmd.current_mesh_names().values() if axis in types)) or "?"


def _name(x: Tensor) -> str:
    """A parameter's logical name; empty for other tensors."""
    return getattr(x, "logical_name", "")
