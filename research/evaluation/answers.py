"""Requests put to a scorer: the longest first, in portions, so that a bar moves and whoever waits can stop it."""

from collections.abc import Callable, Sequence

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
    return exam.metrics(portions(exam.asked, scorer, progress, go_on, portion))


def portions(
    asked: Sequence[Asked],
    scorer: Scorer,
    progress: Callable[[int], object] = lambda n: None,
    go_on: Callable[[], bool] = lambda: True,
    portion: int = PORTION,
) -> list[Scored]:
    """An answer to each, in order; see `answered`."""
    order = sorted(range(len(asked)), key=lambda i: -len(asked[i].ids))  # stable: equal on every rank
    found: dict[int, Scored] = {}
    for first in range(0, len(order), portion):
        if not go_on():
            raise Stopped
        places = order[first : first + portion]
        found.update(zip(places, scorer.score([asked[place] for place in places]), strict=True))
        progress(len(places))
    return [found[i] for i in range(len(asked))]
