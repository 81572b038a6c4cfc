"""The types of an autograd function, found by running it: its forward on typed tensors, then its backward on a typed gradient.

Nothing is declared about our conjugate pairs and cross entropy. What the forward returns is equal on every rank, a piece or a
summand by what it does (research/verification/spmd_collectives.py). Whether an equal result has the whole gradient on every rank (I) or a
part (R) is then decided by the backward: whichever makes it give every input the gradient that its type demands.
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
"""A gradient that must be … -> what it may be found to be inside a function, where no gradient flows: I and R are the same numbers
there, V is meant as a summand, a constant (R) may stand for a piece. A total over ranks (I) never stands for a piece."""
UNWRITTEN = (torch.empty, torch.empty_like, torch.Tensor.new_empty)
"""Buffers: as good as a constant until something is written into them."""


class TypeFinder(TorchFunctionMode):
    """On top of the checker's own mode: types autograd functions by running them, and turns its errors into Misfits."""

    scalar_source = ""
    """The line that made the last number with a gradient: the loss."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not spmd.is_type_checking():
            return func(*args, **kwargs)
        if func in UNWRITTEN:
            with spmd.no_typecheck():
                return spmd.assert_type(func(*args, **kwargs), R)
        function = _applied(func)
        try:
            result = self._apply(function, args) if function else func(*args, **kwargs)
        except spmd.SpmdTypeError as error:
            operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            raise TypeMismatch(_said(function or func, operands), _why(error, operands)) from None
        if func is torch.Tensor.__setitem__:
            _written(args[0], args[-1])
        if isinstance(result, Tensor) and result.ndim == 0 and result.requires_grad:
            self.scalar_source = source()
        return result

    def _apply(self, function: type[torch.autograd.Function], arguments: tuple) -> Tensor:
        misfits: list[TypeMismatch] = []
        for given in _readings(arguments):
            context = Context(tuple(isinstance(a, Tensor) and a.requires_grad for a in arguments))
            try:
                result = self._forward(function, context, given)
            except TypeMismatch as misfit:
                misfits.append(misfit)
                continue
            for types in _flavours(spmd.get_local_type(result)):
                try:
                    self._check_gradients(function, context, given, result, types)
                except TypeMismatch as misfit:
                    misfits.append(misfit)
                else:
                    return _recorded(function, context, result, types, arguments)
        raise misfits[0]

    def _forward(self, function: Any, context: "Context", given: tuple) -> Tensor:
        with torch.no_grad(), self:
            if function.setup_context is torch.autograd.Function.setup_context:
                result = function.forward(context, *given)
            else:
                result = function.forward(*given)
                function.setup_context(context, given, result)
        if not isinstance(result, Tensor):
            raise TypeMismatch(function.__name__, "returns more than one tensor, and types are found for one")
        return result

    def _check_gradients(self, function: Any, context: "Context", given: tuple, result: Tensor, types: Types) -> None:
        """Raises where a result of these types leaves an input without the gradient that its type demands."""
        with spmd.no_typecheck():
            gradient = torch.zeros_like(result)
        spmd.assert_type(gradient, {axis: kind.backward_type() for axis, kind in types.items()})
        with torch.no_grad(), self:
            gradients = _tuple(function.backward(context, gradient))
        for needed, x, found in zip(context.needs_input_grad, given, gradients, strict=True):
            for axis, kind in spmd.get_local_type(x).items() if needed and found is not None else ():
                demanded, gives = kind.backward_type(), spmd.get_local_type(found).get(axis)
                if gives not in SERVES[demanded]:
                    why = f"the gradient of its {kind.value} input must be {demanded.value}, its backward gives {gives and gives.value}"
                    raise TypeMismatch(_said(function, [a for a in given if isinstance(a, Tensor)]), why)


class Context:
    """Stands in for autograd's: the tensors it keeps come back as they are, types and all."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        """As torch's."""
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Of no consequence to types."""

    def set_materialize_grads(self, value: bool) -> None:
        """Of no consequence: the gradient is always there."""


class _Recorded(torch.autograd.Function):
    """The node in autograd's graph: the result that was checked; in the backward pass the function's own, unchecked."""

    @staticmethod
    def forward(ctx, function, context, result, *arguments):
        ctx.function, ctx.context = function, context
        return result[0]

    @staticmethod
    def backward(ctx, gradient):
        with spmd.no_typecheck():
            return None, None, None, *_tuple(ctx.function.backward(ctx.context, gradient))


def _recorded(function: Any, context: Context, result: Tensor, types: Types, arguments: tuple) -> Tensor:
    with spmd.no_typecheck():
        found = _Recorded.apply(function, context, [result.detach()], *arguments)
    return spmd.assert_type(found, types)


def _readings(arguments: tuple) -> Iterator[tuple]:
    """The arguments, tensors as aliases: first typed as they are, then with V read as P where a gradient is wanted."""
    tensors = [(i, a) for i, a in enumerate(arguments) if isinstance(a, Tensor)]
    places = [(i, axis) for i, a in tensors if a.requires_grad for axis, kind in spmd.get_local_type(a).items() if kind is V]
    for read in itertools.product((False, True), repeat=len(places)):
        summands = list(itertools.compress(places, read))
        aliases = {i: _alias(a, summand_on=[axis for j, axis in summands if j == i]) for i, a in tensors}
        yield tuple(aliases.get(i, a) for i, a in enumerate(arguments))


def _alias(x: Tensor, summand_on: list) -> Tensor:
    with spmd.no_typecheck():
        alias = x.detach()
    return spmd.assert_type(alias, spmd.get_local_type(x) | dict.fromkeys(summand_on, P))


def _flavours(types: Types) -> Iterator[Types]:
    """What is equal along an axis may be I or R there; first as it is."""
    choices = [(kind, *(other for other in EQUAL if other is not kind)) if kind in EQUAL else (kind,) for kind in types.values()]
    return (dict(zip(types, chosen, strict=True)) for chosen in itertools.product(*choices))


def _written(buffer: Tensor, value: object) -> None:
    """`buffer[…] = value`: what a rank writes its own into is its own from then on. The checker overlooks it."""
    for axis, kind in spmd.get_local_type(value).items() if isinstance(value, Tensor) else ():
        before = spmd.get_local_type(buffer).get(axis)
        if before in EQUAL and kind not in EQUAL:
            spmd.mutate_type(buffer, axis, src=before, dst=kind)


def _applied(func: Callable) -> type[torch.autograd.Function] | None:
    """The autograd function whose `apply` this is; those that the checker has rules for are left to it."""
    owner = getattr(func, "__self__", None)
    ours = isinstance(owner, type) and issubclass(owner, torch.autograd.Function) and not hasattr(owner, "spmd_typecheck")
    return owner if ours and func.__name__ == "apply" else None


def _tuple(gradients: Any) -> tuple:
    return gradients if isinstance(gradients, tuple) else (gradients,)


def _said(func: Callable, operands: list[Tensor]) -> str:
    """`linear(V, V blocks.0.mlp.up.weight, I)`."""
    return f"{getattr(func, '__name__', func)}({', '.join(f'{_kinds(x)} {_name(x)}'.strip() for x in operands)})"


def _why(error: spmd.SpmdTypeError, operands: list[Tensor]) -> str:
    """The checker's own first sentence, less the axis, of which there is one; and whose gradient it is about."""
    sentence = re.sub(r" on axis \S+", "", str(error).splitlines()[0]).partition(" Found types")[0].rstrip(".")
    invariant = [_name(x) or "the I operand" for x in operands if "I" in _kinds(x)]
    return f"{sentence}: the gradient of {' and '.join(invariant)} is left partial" if sentence.startswith("Invariant") else sentence


def _kinds(x: Tensor) -> str:
    """Along each axis, the outer first: R, I, V or P; ? where nothing is known."""
    types = spmd.get_local_type(x)
    return "".join(dict.fromkeys(types[axis].value for axis in spmd.current_mesh_names().values() if axis in types)) or "?"


def _name(x: Tensor) -> str:
    """A parameter's logical name."""
    return getattr(x, "logical_name", "")
