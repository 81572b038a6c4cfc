"""What a task is: requests made from a file, and metrics made from their answers. No torch, no model, no ranks.

given = Given(tokenizer, scorer.length, experiment.data, root)
for task in tasks.named(["validation", "pairs:FILE.jsonl"], Settings()):
    metrics = answered(task.exam(given), scorer, progress)
"""
# MERGED-DOC """Requests put to a scorer: the longest first, in portions, so that a bar moves and whoever waits can stop it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from research.data.prepare import DataSettings as Data
from research.data.prepare import split
from research.data.token_store import TokenStore
from research.data.tokenizer import Tokenizer
from research.evaluation.scorer import Score, Scorer, ScoreRequest


@dataclass(frozen=True)
class Settings:
    """What a person may set of every task; None: what the task's definition says."""

    limit: int | None = None
    """Examples at most, from the first on: passages, pairs, questions, pages, windows."""
    window: int | None = None
    """Tokens of a window of running text, the first of which is read only; None: as many as the scorer takes."""
    stride: int | None = None
    """Tokens of each window that are scored, but for the first window; None: window − 1, no token is read twice."""
    data: Path | None = None
    """The folder with wikitext2/ and lambada/."""
    root: Path = Path()
    """Where relative paths begin."""


@dataclass(frozen=True)
class TaskContext:
    """What a task may use of the model and its run."""

    tokenizer: Tokenizer
    length: int
    """The scorer's."""
    data: Data
    root: Path
    progress: Callable[[str], None] | None = None
    """Hears of slow work: a text that is tokenized."""

    @cached_property
    def validation(self) -> TokenStore:
        """The run's own validation split, prepared where it is not in data.cache."""
        return self.split(self.data.validation)

    def split(self, spec: str) -> TokenStore:
        """A text as a corpus of the run: tokens, documents, bytes."""
        return split(self.data, spec, self.root, self.tokenizer, self.progress)


@dataclass(frozen=True)
class Metric:
    """One figure."""

    name: str
    value: float
    stderr: float | None
    """The standard error over examples; None where there is one example, or the figure is no mean."""
    higher_is_better: bool = False


@dataclass(frozen=True)
class TaskRequests:
    """A task on a tokenizer: what is asked, and what the answers are worth."""

    asked: list[ScoreRequest]
    examples: int
    metrics: Callable[[Sequence[Score]], list[Metric]]
    """From an answer to each of `asked`, in order. Pure."""


class Task(Protocol):
    """Immutable; making one reads no file but sees that it is there."""

    @property
    def name(self) -> str:
        """As the user has written it; the key of its results."""

    @property
    def settings(self) -> dict[str, Any]:
        """Those that it heeds, as JSON data: with the data's digest and the model they decide the figures."""

    def digest(self, given: TaskContext) -> str:
        """SHA-256 of the data, hex."""

    def exam(self, given: TaskContext) -> TaskRequests:
        """Reads and tokenizes. A Mistake where the file is not what it should be, naming its line."""


PORTION = 64
"""Requests between two looks at the bar; several batches of the scorer's."""


class Stopped(Exception):
    """Nobody wants the answers any more."""


def evaluate(
    exam: TaskRequests,
    scorer: Scorer,
    progress: Callable[[int], object] = lambda n: None,
    go_on: Callable[[], bool] = lambda: True,
    portion: int = PORTION,
) -> list[Metric]:
    """The exam's metrics. `progress(n)` after n more requests; `go_on` is asked before each portion, and False raises Stopped.

    Where the scorer is collective, so is this: the same exam on every rank, and the same answer from `go_on`.
    """
    return exam.metrics(score_in_batches(exam.asked, scorer, progress, go_on, portion))


def score_in_batches(
    asked: Sequence[ScoreRequest],
    scorer: Scorer,
    progress: Callable[[int], object] = lambda n: None,
    go_on: Callable[[], bool] = lambda: True,
    portion: int = PORTION,
) -> list[Score]:
    """An answer to each, in order; see `answered`."""
    order = sorted(range(len(asked)), key=lambda i: -len(asked[i].ids))  # stable: equal on every rank
    found: dict[int, Score] = {}
    for first in range(0, len(order), portion):
        if not go_on():
            raise Stopped
        places = order[first : first + portion]
        found.update(zip(places, scorer.score([asked[place] for place in places]), strict=True))
        progress(len(places))
    return [found[i] for i in range(len(asked))]
