"""An exam put to a scorer: the longest requests first, in portions, so that a bar moves and whoever waits can stop it."""

from collections.abc import Callable

from research.evaluation.task import Exam, Metric
from research.scorer import Asked, Scored, Scorer

PORTION = 64
"""Requests between two looks at the bar; several batches of the scorer's."""


class Stopped(Exception):
    """Nobody wants the answers any more."""


def answered(
    exam: Exam,
    scorer: Scorer,
    progress: Callable[[int], object] = lambda n: None,
    go_on: Callable[[], bool] = lambda: True,
    portion: int = PORTION,
) -> list[Metric]:
    """The exam's metrics. `progress(n)` after n more requests; `go_on` is asked before each portion, and False raises Stopped.

    Where the scorer is collective, so is this: the same exam on every rank, and the same answer from `go_on`.
    """
    order = sorted(range(len(exam.asked)), key=lambda i: -len(exam.asked[i].ids))  # stable: equal on every rank
    found: dict[int, Scored] = {}
    for first in range(0, len(order), portion):
        if not go_on():
            raise Stopped
        places = order[first : first + portion]
        found.update(zip(places, scorer.score(_asked(exam, places)), strict=True))
        progress(len(places))
    return exam.metrics([found[i] for i in range(len(exam.asked))])


def _asked(exam: Exam, places: list[int]) -> list[Asked]:
    return [exam.asked[place] for place in places]
