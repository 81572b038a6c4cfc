"""Is this loss out of the ordinary? More than so many standard deviations above the mean of the last hundred steps."""

import math
from collections import deque
from collections.abc import Iterable

WINDOW, LEAST = 100, 20
"""Steps that are remembered, and how many must be before one of them can be unusual."""


class Spikes:
    """Fed with every step's loss; `threshold` in standard deviations, 0: nothing is a spike."""

    def __init__(self, threshold: float, recent: Iterable[float] = ()) -> None:
        self.threshold = threshold
        self.recent: deque[float] = deque(recent, WINDOW)

    def is_one(self, loss: float) -> bool:
        """Whether this loss is a spike; it is remembered either way, so that a new level is soon the usual one."""
        unusual = self.threshold > 0 and len(self.recent) >= LEAST and loss > self.limit()
        if math.isfinite(loss):
            self.recent.append(loss)
        return unusual

    def limit(self) -> float:
        """What a loss must exceed to be one."""
        mean = sum(self.recent) / len(self.recent)
        deviation = math.sqrt(sum((loss - mean) ** 2 for loss in self.recent) / len(self.recent))
        return mean + self.threshold * deviation
