"""Measures how long each layer, and each module directly in it, takes in the forward and the backward pass of some steps.

The timeline of a rank is cut at marks: a forward pass begins and ends, the gradient of a module's output is complete, a backward pass ends.
What lies between two marks belongs to the label that the first one set, so the seconds of all labels add up to the whole time.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parallel.layers import Call

FORWARD, BACKWARD, RECOMPUTED = DIRECTIONS = ("forward", "backward", "recomputed")
DATA, OPTIMIZER, OTHER = NOT_LAYERS = ("data", "optimizer", "other")


class Label(NamedTuple):
    """What a stretch of time belongs to."""

    layer: str
    """embedding, blocks.0, …, loss; or data, optimizer or other (the engine, communication between stages, waiting)."""
    part: str = ""
    """The module within the layer: attention, mlp; empty for what the layer does itself."""
    direction: str = ""
    """forward, backward or recomputed (a forward pass that is repeated within the backward pass); empty outside of layers."""

    def __str__(self) -> str:
        return " ".join(filter(None, [self.direction, f"{self.layer}.{self.part}" if self.part else self.layer]))


class Spent(NamedTuple):
    """Seconds, and how often they began."""

    seconds: float
    times: int


class LayerTimer:
    """Marks on this rank's timeline, set between `begin` and `end`; at any other time its hooks do nothing.

    The backward pass of a module lasts from the moment at which the gradient of its output is complete until the next mark. On a GPU the
    marks are CUDA events on the current stream, so that the kernels are measured and not their launch (not run).
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.active = False
        self._marks: list[tuple[Label | None, Any]] = []
        """(the label from here on, the time); None: recording has ended."""
        self._outer: list[Label] = []
        """The labels to return to when a forward pass ends."""
        self._in_backward = False
        self._thread = 0
        self._range: Any = None
        """The open range of torch's profiler. It shows the label in the trace."""
        self._hooks: list[Any] = []

    def begin(self) -> None:
        """Begins to record a step."""
        self.active, self._thread = True, threading.get_ident()
        self._outer.clear()
        self.mark(Label(OTHER))

    def end(self) -> None:
        """Ends the recording of a step."""
        self.mark(None)
        self.active = self._in_backward = False

    def mark(self, label: Label | None) -> None:
        """From now on, time belongs to `label`."""
        if not self.active:
            return
        now: Any = time.perf_counter()
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((label, now))
        if threading.get_ident() == self._thread:  # a range must end in the thread in which it began; CUDA has threads for backward passes
            if self._range is not None:
                self._range.__exit__(None, None, None)
            self._range = torch.profiler.record_function(str(label)) if label else None
            if self._range is not None:
                self._range.__enter__()

    @contextmanager
    def during(self, label: Label) -> Iterator[None]:
        """Time inside belongs to `label`, and after it to what it belonged to before."""
        self._enter(label)
        try:
            yield
        finally:
            self._leave()

    def within(self, layer: str, call: Call) -> Call:
        """A CallHook: wraps a layer's call, or the loss function, and watches the modules directly in it, if it is a module."""
        if isinstance(call, nn.Module):
            for part, module in call.named_children():
                self._watch(Label(layer, part), module)

        def timed(*inputs: Any, **context: Any) -> Any:
            if not self.active:
                return call(*inputs, **context)
            with self.during(Label(layer, "", FORWARD)):
                y = call(*inputs, **context)
            self._mark_backward(y, Label(layer, "", BACKWARD))
            return y

        return timed

    def remove(self) -> None:
        """Removes the hooks of the modules in the layers. The calls that `within` has wrapped are their owner's to restore."""
        while self._hooks:
            self._hooks.pop().remove()

    def spent(self) -> dict[Label, Spent]:
        """The time of every label, over all recorded steps."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds: dict[Label, float] = defaultdict(float)
        times: dict[Label, int] = defaultdict(int)
        for (label, began), (_, ended) in zip(self._marks, self._marks[1:], strict=False):
            if label is not None:
                seconds[label] += began.elapsed_time(ended) / 1e3 if self.cuda else ended - began
                times[label] += 1
        return {label: Spent(seconds[label], times[label]) for label in seconds}

    def _watch(self, label: Label, module: nn.Module) -> None:
        def before(module: nn.Module, inputs: Any) -> None:
            if self.active:
                self._enter(label._replace(direction=RECOMPUTED if self._in_backward else FORWARD))

        def after(module: nn.Module, inputs: Any, y: Any) -> None:
            if self.active:
                self._leave()
                if not (inputs and y is inputs[0]):  # dropout that drops nothing returns what it was given
                    self._mark_backward(y, label._replace(direction=BACKWARD))

        self._hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _enter(self, label: Label) -> None:
        if self.active:
            self._outer.append(next((was for was, _ in self._marks[-1:] if was is not None), Label(OTHER)))
            self.mark(label)

    def _leave(self) -> None:
        if self.active and self._outer:
            self.mark(self._outer.pop())

    def _mark_backward(self, y: Any, label: Label) -> None:
        """Sets the label when the gradient of `y` is complete, which is just before the backward pass of what computed it."""

        def begun(gradient: Tensor) -> None:
            if not self.active:
                return
            if not self._in_backward:
                self._in_backward = True
                torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)
            self._outer.clear()  # torch ends a repeated forward pass as soon as it has what it needs
            self.mark(label)

        if isinstance(y, Tensor) and y.requires_grad:
            with suppress(RuntimeError):  # a tensor of which autograd allows no hook
                y.register_hook(begun)

    def _backward_ends(self) -> None:
        self._in_backward = False
        self.mark(Label(OTHER))
