"""How the time of a function grows with the size of its input: 4 for one in proportion to it, 16 for its square."""

import time
from collections.abc import Callable

SHORTEST = 2e-3
"""Seconds that a measurement takes at least, by repetition: the clock's steps are shorter."""


def growth(prepare: Callable[[int], Callable[[], object]], size: int) -> float:
    """The time at 4 * size divided by that at `size`. `prepare(size)` makes the input and returns what is measured.

    Measured is the processor's time, of all threads. Of several measurements of each the shortest counts, taken in turns, because
    other programs slow some of them down.
    """
    calls = [prepare(size), prepare(4 * size)]
    best = [float("inf")] * 2
    for _ in range(5):
        for i, call in enumerate(calls):
            best[i] = min(best[i], _seconds(call))
    return best[1] / best[0]


def _seconds(call: Callable[[], object]) -> float:
    begun, count = time.process_time(), 0
    while not count or time.process_time() - begun < SHORTEST:
        call()
        count += 1
    return (time.process_time() - begun) / count
