"""A model as a list of named, unbuilt layers, and the plain module made from it.

The list is pure: it can be counted, cut into stages and printed without a process group. DeepSpeed's PipelineModule is made
from the same list (parallel/engines/engine.py).
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
    """Name of an earlier layer, which is then the one argument of `make`: a head that uses the embedding's weight."""
    is_block: bool = False
    """Blocks are what stages share out; a stage without one would hold nothing to train."""
    reads_context: bool = False
    """Whether the layer takes the context tensors behind x; the others are only passed by them."""
    drops_context: bool = False
    """The last layer: what it returns is all that is wanted."""

    def build(self) -> nn.Module:
        """The module, with its parameters drawn."""
        return self.make(**self.arguments)


Activations: TypeAlias = "Tensor | tuple[Tensor, ...]"
"""What goes from layer to layer: x, or x followed by integer context tensors that no layer changes."""


Call: TypeAlias = Callable[..., Any]
"""A layer's module, or what stands for it: x (and context) -> x."""
CallHook: TypeAlias = Callable[[str, Call], Call]
"""(layer's name, its call) -> a call that does the same and is observed."""


def apply_layer(layer: Layer, call: Call, passed: Activations) -> Activations:
    """One layer's step: `call` on x (and the context, where the layer reads it), the context handed on beside the result."""
    if isinstance(passed, Tensor):
        return call(passed)
    x, *context = passed
    y = call(x, *context) if layer.reads_context else call(x)
    return y if layer.drops_context else (y, *context)


class PlainModule(nn.Module):
    """All layers in one process, called in order. Submodules are named so that parameter names are the logical names."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.steps: list[tuple[Layer, Call]] = []
        built: dict[str, nn.Module] = {}
        for layer in layers:
            built[layer.name] = layer.make(built[layer.tied_to]) if layer.tied_to else layer.build()
            _attach(self, layer.name, built[layer.name])
        # A plain list beside the tree: registered once, under the logical name.
        object.__setattr__(self, "steps", list(zip(layers, built.values(), strict=True)))

    def watch(self, watcher: CallHook) -> None:
        """From now on each layer is called through `watcher(name, call)`."""
        self.steps = [(layer, watcher(layer.name, call)) for layer, call in self.steps]

    def hidden(self, passed: Activations) -> Tensor:
        """ids 'b s' -> x 'b s d': every layer but the head. For inference, which needs logits of few places."""
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


def _attach(root: nn.Module, name: str, module: nn.Module) -> None:
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(last, module)


def stage_bounds(layers: Sequence[Layer], stages: int) -> list[int]:
    """Where each stage begins, and the end: stage i runs layers[bounds[i]:bounds[i + 1]].

    Blocks are dealt out evenly, earlier stages take the remainder's smaller share so that the last, which also has the head, is
    never the only large one; what precedes the first block belongs to stage 0, what follows the last to the last stage.
    """
    blocks = [i for i, layer in enumerate(layers) if layer.is_block]
    if len(blocks) < stages:
        raise Mistake(f"parallel.pipe = {stages} is more than model.num_layers = {len(blocks)} → use {len(blocks)} or less")
    firsts = [blocks[len(blocks) * stage // stages] for stage in range(1, stages)]
    return [0, *firsts, len(layers)]


def unique_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(logical name, parameter) of a built module, each parameter once, in the order of the layers."""
    for parameter in module.parameters():
        yield logical_name(parameter), parameter
