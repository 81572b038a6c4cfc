"""The clock of a run: mean loss, speed and time left, with evaluation time kept apart from training time."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from research.config import Schedule
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
    all_pauses: float = 0.0
    pauses: int = 0

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
    def paused(self) -> Iterator[None]:
        """Time in here is not training: it counts in `seconds`, not in tokens per second."""
        before = self.clock()
        yield
        spent = self.clock() - before
        self.interval_pause += spent
        self.all_pauses += spent
        self.pauses += 1

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

    def seconds_left(self, step: int, schedule: Schedule) -> float:
        """Steps and evaluations still to come, at their mean duration so far; `step` is taken but not yet evaluated."""
        a_step = (self._here() - self.all_pauses) / max(self.steps, 1)
        a_pause = self.all_pauses / max(self.pauses, 1)
        every = schedule.validate_every or schedule.steps
        evaluations = math.ceil(schedule.steps / every) - (step - 1) // every
        return a_step * (schedule.steps - step) + a_pause * evaluations

    def _here(self) -> float:
        """Seconds since `start`."""
        return self.clock() - self.began
