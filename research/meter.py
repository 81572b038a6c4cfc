"""The clock of a run: mean loss, speed and time left, with evaluation time kept apart from training time."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from research.memory import peak_memory_mb
from research.metrics import perplexity


@dataclass
class Meter:
    """Fed with every step's loss; read once an interval. `clock` gives seconds."""

    tokens_per_step: int
    clock: Callable[[], float] = time.monotonic
    losses: list[float] = field(default_factory=list)
    """Of the steps since the last interval."""
    lr: float = 0.0
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

    def step(self, loss: float, lr: float) -> None:
        """One step was taken."""
        self.losses.append(loss)
        self.lr, self.steps, self.interval_steps = lr, self.steps + 1, self.interval_steps + 1

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

    def interval(self, grad_norm: float) -> dict[str, float]:
        """The row of the steps since the last call: their mean loss, their speed; the last one's learning rate and norm."""
        loss = sum(self.losses) / len(self.losses)
        trained = max(self.clock() - self.interval_began - self.interval_pause, 1e-9)
        row = {
            "train/loss": loss,
            "train/ppl": perplexity(loss),
            "train/lr": self.lr,
            "train/grad_norm": grad_norm,
            "perf/tokens_per_second": self.interval_steps * self.tokens_per_step / trained,
            "perf/memory_mb": peak_memory_mb(),
        }
        self.losses, self.interval_steps, self.interval_began, self.interval_pause = [], 0, self.clock(), 0.0
        return row

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
