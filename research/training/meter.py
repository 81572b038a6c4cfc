"""Measurements of a run: mean loss, time per step, tokens per second, time left, memory. Evaluation is not training time."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch

from research.cluster.memory import HostMemory

Item = TypeVar("Item")


class Interval(NamedTuple):
    """The steps since the last row: their mean loss, tokens per second of training, and milliseconds per step."""

    loss: float
    tokens_per_second: float
    step_ms: float
    """Without pauses."""
    data_ms: float
    """The part of `step_ms` in which this rank waited for its micro-batches."""


def gpu_memory() -> dict[str, float]:
    """The row's figures that show whether a GPU's memory is fragmented or nearly full; none on a CPU.

    Reserved memory that is far above the allocated one is fragmented. A retry is an allocation that was possible only after all cached
    memory had been given back, which is slow. An OOM is an allocation that failed.
    """
    if not torch.cuda.is_available():
        return {}
    statistics = torch.cuda.memory_stats()
    return {
        "perf/memory_reserved_mb": torch.cuda.max_memory_reserved() / 1e6,
        "perf/memory_retries": float(statistics.get("num_alloc_retries", 0)),
        "perf/memory_ooms": float(statistics.get("num_ooms", 0)),
    }


@dataclass
class Meter:
    """Collects every step's loss and is read once per interval. `clock` returns seconds."""

    clock: Callable[[], float] = time.monotonic
    losses: list[float] = field(default_factory=list)
    """The losses of the steps since the last interval."""
    earlier: float = 0.0
    """Seconds that the run had taken before this process."""
    steps: int = 0
    """Steps taken by this process."""
    tokens: int = 0
    """Tokens of these steps."""
    interval_steps: int = 0
    interval_tokens: int = 0
    began: float = 0.0
    interval_began: float = 0.0
    interval_pause: float = 0.0
    interval_data: float = 0.0
    """Seconds in which this rank has waited for micro-batches since the last interval."""
    memory: HostMemory = field(default_factory=HostMemory)
    """Made before the model is built."""
    pauses: dict[str, list[float]] = field(default_factory=dict)
    """The duration of every pause in seconds, by its kind."""

    def start(self) -> None:
        """Starts the clock."""
        self.began = self.interval_began = self.clock()

    def resume(self, seconds: float, losses: list[float]) -> None:
        """Continues where another process stood after `seconds`, with the `losses` of its steps that no row holds yet."""
        self.earlier, self.losses = seconds, losses

    def step(self, loss: float, tokens: int) -> None:
        """Counts one step."""
        self.losses.append(loss)
        self.steps, self.interval_steps = self.steps + 1, self.interval_steps + 1
        self.tokens, self.interval_tokens = self.tokens + tokens, self.interval_tokens + tokens

    @contextlib.contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Time inside is not training time: it counts in `seconds` but not in tokens per second. `what` names the kind of pause."""
        before = self.clock()
        try:
            yield
        finally:
            spent = self.clock() - before
            self.interval_pause += spent
            self.pauses.setdefault(what, []).append(spent)

    def waited_for(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The same micro-batches; the time until each is there counts as time spent on data."""
        source = iter(batches)
        while True:
            before = self.clock()
            try:
                batch = next(source)
            except StopIteration:
                return
            finally:
                self.interval_data += self.clock() - before
            yield batch

    def interval(self) -> Interval:
        """What the steps since the last call took; begins a new interval."""
        loss, now = sum(self.losses) / len(self.losses), self.clock()
        trained = max(now - self.interval_began - self.interval_pause, 1e-9)
        steps = max(self.interval_steps, 1)
        speed = self.interval_tokens / trained
        found = Interval(loss, speed, 1e3 * trained / steps, 1e3 * self.interval_data / steps)
        self.losses, self.interval_steps, self.interval_tokens, self.interval_began = [], 0, 0, now
        self.interval_pause = self.interval_data = 0.0
        return found

    def mean_step_ms(self) -> float:
        """Milliseconds of a step of this process so far, without pauses; 0 before the first one."""
        paused = sum(map(sum, self.pauses.values()))
        return 1e3 * (self.clock() - self.began - paused) / self.steps if self.steps else 0.0

    def memory_row(self) -> dict[str, float]:
        """The keys of metrics.jsonl: the peak on this rank's GPU, or else of the whole process, and what the run has added on the host."""
        host = self.memory.row()  # before the peak, which is then not below it
        peak = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else self.memory.peak()
        return {"perf/memory_mb": peak, **gpu_memory(), **host}

    def seconds(self) -> float:
        """Seconds of the whole run so far, evaluations included."""
        return self.earlier + self.clock() - self.began

    def seconds_left(self, step: int, steps: int, tokens: int, intervals: Mapping[str, int]) -> float:
        """The duration of the steps and pauses still to come, at their mean so far; `step` is taken, what is due after it is not yet done.

        `tokens`: those of the steps still to come. The mean of steps is one per token, as steps may grow.
        `intervals`: the steps between two pauses of each kind, of which one more comes at the end; 0: only that one.
        """
        paused = sum(map(sum, self.pauses.values()))
        left = (self.clock() - self.began - paused) / max(self.tokens, 1) * tokens
        for kind, every in intervals.items():
            durations = self.pauses.get(kind, [])
            to_come = math.ceil(steps / (every or steps)) - (step - 1) // (every or steps)
            left += to_come * sum(durations) / max(len(durations), 1)
        return left
