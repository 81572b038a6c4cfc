"""A model as a list of named, unbuilt layers, the plain module that is built from it, and its division into pipeline stages.

The list is pure: it can be counted, cut into stages and printed without a process group. DeepSpeed's PipelineModule is built
from the same list (parallel/engines/pipeline.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn

from parallel.errors import Mistake
from parallel.slices import logical_name


@dataclass(frozen=True)
class Layer:
    """One unbuilt layer: x -> x. Its name begins the logical names of its parameters."""

    name: str
    make: Callable[..., nn.Module]
    arguments: dict[str, Any] = field(default_factory=dict)
    tied_to: str | None = None
    """Name of an earlier layer, which is then the only argument of `make`: a head that uses the embedding's weight."""
    is_block: bool = False
    """Blocks are distributed over the stages; every stage needs one, or it would have nothing to train."""
    context: tuple[str, ...] = ()
    """The names of the context tensors behind x, in order: the same for every layer of a list, and what layers before it have added."""
    reads: tuple[str, ...] = ()
    """The names of those that the layer takes, as keyword arguments. The others it only passes on."""
    adds: tuple[str, ...] = ()
    """The names of tensors that the layer returns behind x. For the layers behind it they are context, so it must lie behind the blocks:
    a pipeline sends integers alone beside x."""
    drops_context: bool = False
    """Whether the result is returned without the context: the last layer."""

    def build(self) -> nn.Module:
        """The module, with its parameters drawn."""
        return self.make(**self.arguments)


Activations: TypeAlias = "Tensor | tuple[Tensor, ...]"
"""What one layer passes to the next: x, or x followed by integer context tensors that no layer changes."""

Call: TypeAlias = Callable[..., Any]
"""A layer's module, or a replacement for it: x (and context tensors by name) -> x."""
CallHook: TypeAlias = Callable[[str, Call], Call]
"""(layer's name, its call) -> a call that does the same and observes it."""


def apply_layer(layer: Layer, call: Call, passed: Activations) -> Activations:
    """Calls one layer on x, and on the context tensors that it reads; returns the result with the context beside it.

    x alone, without context, goes through every layer alone: inference has none.
    """
    if isinstance(passed, Tensor):
        return call(passed)
    x, *tensors = passed
    context = dict(zip(layer.context, tensors, strict=True))
    y = call(x, **{name: context[name] for name in layer.reads})
    if layer.drops_context:
        return y
    x, *added = y if layer.adds else (y,)
    return (x, *tensors, *added)


class PlainModule(nn.Module):
    """All layers in one process, called in order. Submodules are named so that parameter names are the logical names."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        built: dict[str, nn.Module] = {}
        for layer in layers:
            built[layer.name] = module = layer.make(built[layer.tied_to]) if layer.tied_to else layer.build()
            # Attach it at its dotted name, with plain modules on the way.
            *path, last = layer.name.split(".")
            parent: nn.Module = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, module)
        self.steps: list[tuple[Layer, Call]] = list(zip(layers, built.values(), strict=True))
        """The layers in order. A plain list is not registered by nn.Module, so each module is registered once."""
        self.context = layers[0].context
        """The names of the context tensors that `forward` takes behind the ids."""

    def watch(self, hook: CallHook) -> Callable[[], None]:
        """Calls each layer through `hook(name, call)` until what is returned is called, the last of several hooks first."""
        before, self.steps = self.steps, [(layer, hook(layer.name, call)) for layer, call in self.steps]
        return lambda: setattr(self, "steps", before)

    def hidden(self, passed: Activations) -> Tensor:
        """ids 'b s' -> x 'b s d': every layer but the head. For inference, which needs the logits of few positions."""
        for layer, call in self.steps[:-1]:
            passed = apply_layer(layer, call, passed)
        assert isinstance(passed, Tensor)
        return passed

    def logits(self, x: Tensor) -> Tensor:
        """x 'b s d' as `hidden` returns it -> logits 'b s v', this rank's vocabulary rows: the head."""
        logits = apply_layer(*self.steps[-1], x)
        assert isinstance(logits, Tensor)
        return logits

    def forward(self, passed: Activations) -> Activations:
        """ids 'b s' (and context) -> logits 'b s v', this rank's vocabulary rows."""
        for layer, call in self.steps:
            passed = apply_layer(layer, call, passed)
        return passed


def stage_bounds(layers: Sequence[Layer], stages: int) -> list[int]:
    """Where each pipeline stage begins, and the end: stage i runs layers[bounds[i]:bounds[i + 1]].

    Blocks are distributed evenly. Earlier stages have the smaller shares, so that the last stage, which also has the head, is never
    the only large one. Layers before the first block belong to stage 0, layers after the last block to the last stage.
    """
    blocks = [i for i, layer in enumerate(layers) if layer.is_block]
    if len(blocks) < stages:
        raise Mistake(f"parallel.pipe = {stages} is more than the {len(blocks)} blocks of the model → use {len(blocks)} or less")
    firsts = [blocks[len(blocks) * stage // stages] for stage in range(1, stages)]
    return [0, *firsts, len(layers)]


def unique_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(logical name, parameter) of a built module, each parameter once, in the order of the layers."""
    for parameter in module.parameters():
        yield logical_name(parameter), parameter
