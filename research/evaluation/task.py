"""What an evaluation task is, and how it is put to a scorer. Imports no torch: a task knows neither the model nor its ranks.

A task makes requests from a file and computes metrics from the scores:

    context = TaskContext(tokenizer, scorer.length, experiment.data, root)
    for task in registry.create_tasks(["validation", "pairs:FILE.jsonl"], Settings()):
        metrics = evaluate(task.requests(context), scorer, progress)
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from research.data.fill_in_middle import Sentinels
from research.data.records import Progress, silent
from research.data.sources import DataSettings as Data
from research.data.tokenizer import Tokenizer
from research.evaluation.scorer import Score, Scorer, ScoreRequest

BATCH_SIZE = 64
"""Number of requests between two updates of a progress bar; several batches of the scorer."""


class ShowProgress(Protocol):
    """Console.progress: shows work of `total` parts, and yields a function that is told of n more parts."""

    def __call__(self, label: str, total: int | None = None, /) -> AbstractContextManager[Callable[[int], object]]: ...


@dataclass(frozen=True)
class Settings:
    """Settings that a user can change for every task; None: the default of the task's definition."""

    limit: int | None = None
    """The maximum number of examples (passages, pairs, questions, pages, windows), counted from the first."""
    window: int | None = None
    """The number of tokens of a window of running text, of which the first is only read; None: as many as the scorer takes."""
    stride: int | None = None
    """The number of tokens scored in each window but the first; None: window − 1, so that no token is read twice."""
    data: Path | None = None
    """The folder that contains wikitext2/ and lambada/."""
    root: Path = Path()
    """The folder that relative paths start from."""


@dataclass(frozen=True)
class TaskContext:
    """What a task may use of the model and its run."""

    tokenizer: Tokenizer
    length: int
    """The scorer's maximum length of a request."""
    data: Data
    root: Path
    progress: Progress = silent
    """Shows slow work such as tokenizing a text."""
    sentinels: Sentinels | None = None
    """Those of a run that was trained to fill in a middle."""
    separator: str | None = None
    """The token between source and target of a run that was trained on pairs."""


@dataclass(frozen=True)
class Metric:
    """One number that a task computes."""

    name: str
    value: float
    stderr: float | None
    """The standard error over examples; None if there is only one example or the number is no mean."""
    higher_is_better: bool = False


@dataclass(frozen=True)
class TaskRequests:
    """The requests of a task for one tokenizer, and the function that computes its metrics from the scores."""

    requests: list[ScoreRequest]
    examples: int
    metrics: Callable[[Sequence[Score]], list[Metric]]
    """Takes one score per request, in order. A pure function."""


class Task(Protocol):
    """An immutable task. Its constructor checks that its file exists but does not read it."""

    @property
    def name(self) -> str:
        """The name as the user wrote it; the key of its results."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the task uses, as JSON data. Together with the data's digest and the model they determine its metrics."""

    def digest(self, context: TaskContext) -> str:
        """SHA-256 of the data, in hexadecimal."""

    def requests(self, context: TaskContext) -> TaskRequests:
        """Reads and tokenizes the data. Raises a Mistake that names the line if the file is not in the task's format."""


@dataclass(frozen=True)
class TextRequest:
    """A prompt that a model continues, always with the most likely token."""

    ids: tuple[int, ...]
    max_new_tokens: int
    ends: tuple[int, ...]
    """The ids that end the text and are no part of it."""


@dataclass(frozen=True)
class TextRequests:
    """The requests of a task for one tokenizer, and the function that computes its metrics from the texts."""

    requests: list[TextRequest]
    examples: int
    metrics: Callable[[Sequence[str]], list[Metric]]
    """Takes one text per request, in order. A pure function."""


@runtime_checkable
class TextTask(Protocol):
    """A task like Task, but for texts that the model writes instead of scores."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    def digest(self, context: TaskContext) -> str: ...

    def texts(self, context: TaskContext) -> TextRequests:
        """Reads and tokenizes the data. Raises a Mistake that names the line if the file is not in the task's format."""


class Stopped(Exception):
    """Raised when `should_continue` returned False."""


def evaluate(
    task: TaskRequests,
    scorer: Scorer,
    progress: Callable[[int], object] = lambda n: None,
    should_continue: Callable[[], bool] = lambda: True,
    batch_size: int = BATCH_SIZE,
) -> list[Metric]:
    """Scores the task's requests and returns its metrics; the arguments are those of `score_in_batches`."""
    return task.metrics(score_in_batches(task.requests, scorer, progress, should_continue, batch_size))


def score_in_batches(
    requests: Sequence[ScoreRequest],
    scorer: Scorer,
    progress: Callable[[int], object] = lambda n: None,
    should_continue: Callable[[], bool] = lambda: True,
    batch_size: int = BATCH_SIZE,
) -> list[Score]:
    """One score per request, in order. The scorer gets `batch_size` requests at a time, the longest first.

    Calls `progress(n)` after n more requests, and `should_continue()` before each batch; raises Stopped if it returns False.
    If the scorer is collective, so is this function: it needs the same requests and the same `should_continue()` on every rank.
    """
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids))  # stable: equal on every rank
    scores: dict[int, Score] = {}
    for first in range(0, len(order), batch_size):
        if not should_continue():
            raise Stopped
        batch = order[first : first + batch_size]
        scores.update(zip(batch, scorer.score([requests[i] for i in batch]), strict=True))
        progress(len(batch))
    return [scores[i] for i in range(len(requests))]
