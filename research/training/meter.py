"""The clock of a run: mean loss, speed and time left, with evaluation time kept apart from training time."""
# MERGED-DOC """How much memory this rank has used."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch


def peak_memory_mb() -> float:
    """The largest so far in MB (1e6 bytes): allocated on its GPU where there is one, else resident memory of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


@dataclass
class Meter:
    """Fed with every step's loss; read once an interval. `clock` gives seconds."""

    tokens_per_step: int
    clock: Callable[[], float] = time.monotonic
    losses: list[float] = field(default_factory=list)
    """Of the steps since the last interval."""
    earlier: float = 0.0
    """Seconds of the run before this process."""
    steps: int = 0
    interval_steps: int = 0
    """Of this process."""
    began: float = 0.0
    interval_began: float = 0.0
    interval_pause: float = 0.0
    pauses: dict[str, list[float]] = field(default_factory=dict)
    """For each kind of pause what each one took, in seconds."""

    def start(self) -> None:
        """The run begins now."""
        self.began = self.interval_began = self.clock()

    def resume(self, seconds: float, losses: list[float]) -> None:
        """Go on from where another process stood after so many seconds, with these steps' losses not yet in a row."""
        self.earlier, self.losses = seconds, losses

    def step(self, loss: float) -> None:
        """One step was taken."""
        self.losses.append(loss)
        self.steps, self.interval_steps = self.steps + 1, self.interval_steps + 1

    @contextlib.contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Time in here is not training: it counts in `seconds`, not in tokens per second. `what`: the kind of pause."""
        before = self.clock()
        try:
            yield
        finally:
            spent = self.clock() - before
            self.interval_pause += spent
            self.pauses.setdefault(what, []).append(spent)

    def interval(self) -> tuple[float, float]:
        """(mean loss, tokens per second) of the steps since the last call, which begins a new interval."""
        loss = sum(self.losses) / len(self.losses)
        trained = max(self.clock() - self.interval_began - self.interval_pause, 1e-9)
        speed = self.interval_steps * self.tokens_per_step / trained
        self.losses, self.interval_steps, self.interval_began, self.interval_pause = [], 0, self.clock(), 0.0
        return loss, speed

    def seconds(self) -> float:
        """Of the whole run, evaluations included."""
        return self.earlier + self._here()

    def seconds_left(self, step: int, steps: int, intervals: Mapping[str, int]) -> float:
        """Steps and pauses still to come, at their mean duration so far; `step` is taken, what is due after it not yet done.

        `intervals`: steps between two pauses of a kind, of which one more comes at the end; 0: that one alone.
        """
        paused = sum(map(sum, self.pauses.values()))
        left = (self._here() - paused) / max(self.steps, 1) * (steps - step)
        for what, every in intervals.items():
            taken = self.pauses.get(what, [])
            still = math.ceil(steps / (every or steps)) - (step - 1) // (every or steps)
            left += still * sum(taken) / max(len(taken), 1)
        return left

    def _here(self) -> float:
        """Seconds since `start`."""
        return self.clock() - self.began
