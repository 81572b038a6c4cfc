"""Where does a step first stop being finite? Its micro-batches through a plain module, every output and gradient looked at."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel.engine import MicroBatch
from parallel.layers import PlainModule, unique_parameters

Loss = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]


@dataclass(frozen=True)
class Culprit:
    """The first thing that is not finite: where, in which micro-batch (from 0), which of its rows, what."""

    phase: str
    """weights, forward, loss or backward."""
    name: str
    """A layer's or module's name, or a logical parameter's."""
    micro_batch: int
    rows: tuple[int, ...]
    what: str
    """'3 of 512 values'."""


@dataclass(frozen=True)
class Examined:
    """A whole step in one process."""

    culprits: list[Culprit]
    """The first of each phase that has one, in order of time."""
    loss: float
    grad_norm: float


def examine(module: PlainModule, loss: Loss, batches: Iterable[MicroBatch], scale: float = 1.0) -> Examined:
    """Forward and backward of one step; gradients accumulate in the module. `scale`: of the loss, as fp16 needs it."""
    culprits = [_parameter("weights", name, p, 0) for name, p in unique_parameters(module) if not _finite(p)][:1]
    total, count = 0.0, 0
    for i, batch in enumerate(batches):
        seen: list[Culprit] = []
        hooks = _watched(module, i, seen)
        value = loss(module(batch.inputs()), (batch.targets, batch.weights))
        (value * scale).backward()
        for hook in hooks:
            hook.remove()
        if not _finite(value):
            seen.append(Culprit("loss", "loss", i, (), str(value.item())))
        culprits += seen
        total, count = total + value.item(), count + 1
    culprits += [_parameter("backward", name, p.grad, 0) for name, p in _with_gradient(module) if not _finite(p.grad)][:1]
    norm = torch.stack([p.grad.float().norm() / scale for _, p in _with_gradient(module)]).norm()
    return Examined(_first_of_each(culprits), total / max(count, 1), float(norm) / max(count, 1))


def _first_of_each(culprits: list[Culprit]) -> list[Culprit]:
    """The first of each phase; of a gradient's, the layer it first shows in and the parameter."""
    found: dict[tuple[str, bool], Culprit] = {}
    for culprit in culprits:
        found.setdefault((culprit.phase, culprit.name.endswith((".weight", ".bias"))), culprit)
    return list(found.values())


def _watched(module: nn.Module, micro_batch: int, seen: list[Culprit]) -> list[Any]:
    """Looks at the output of every module that has no modules of its own, and at the gradient that comes back to it."""
    names = [(name, part) for name, part in module.named_modules() if name and not any(part.children())]
    return [part.register_forward_hook(_looking(name, micro_batch, seen)) for name, part in names]


def _looking(name: str, micro_batch: int, seen: list[Culprit]) -> Callable[..., None]:
    def look(module: nn.Module, inputs: Any, y: Any) -> None:
        if not isinstance(y, Tensor):
            return
        if not _finite(y):
            seen.append(_values("forward", name, y, micro_batch))
        if y.requires_grad:
            y.register_hook(lambda gradient: None if _finite(gradient) else seen.append(_values("backward", name, gradient, micro_batch)))

    return look


def _values(phase: str, name: str, values: Tensor, micro_batch: int) -> Culprit:
    wild = ~values.isfinite()
    rows = tuple(int(row) for row in wild.flatten(1).any(1).nonzero().flatten()) if values.dim() > 1 else ()
    return Culprit(phase, name, micro_batch, rows, f"{int(wild.sum())} of {values.numel()} values")


def _parameter(phase: str, name: str, values: Tensor | None, micro_batch: int) -> Culprit:
    assert values is not None
    return Culprit(phase, name, micro_batch, (), f"{int((~values.isfinite()).sum())} of {values.numel()} values")


def _with_gradient(module: PlainModule) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in unique_parameters(module) if parameter.grad is not None]


def _finite(values: Tensor | None) -> bool:
    return values is None or bool(values.isfinite().all())
