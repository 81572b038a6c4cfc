"""The tasks of `evaluate.tasks`, ready to be put to a model while it trains: checked before torch, read before the first step."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from research.config import Experiment
from research.data.tokenizer import Tokenizer
from research.evaluation import registry
from research.evaluation.scorer import Scorer
from research.evaluation.task import Metric, Settings, Task, TaskContext, TaskRequests, evaluate


@dataclass(frozen=True)
class PreparedTask:
    """A task, and what it asks with the run's tokenizer."""

    task: Task
    exam: TaskRequests
    digest: str
    """SHA-256 of its data."""


def check_tasks(experiment: Experiment, root: Path) -> None:
    """Refuse in milliseconds what can be seen without reading: unknown tasks, missing files, an interval without tasks."""
    asked = experiment.evaluate
    if asked.every and not asked.tasks:
        raise Mistake(
            f"evaluate.every = {asked.every}, but evaluate.tasks is empty → name some, e.g. {registry.VALIDATION}, or use every 0"
        )
    chosen(experiment, root)


def chosen(experiment: Experiment, root: Path) -> list[Task]:
    """The tasks, none read; relative paths begin at `root`."""
    asked = experiment.evaluate
    data = Path(asked.data) if asked.data else None
    return registry.named(asked.tasks, Settings(limit=asked.limit or None, data=data, root=root))


def prepare_tasks(
    experiment: Experiment, root: Path, tokenizer: Tokenizer, say: Callable[[str], None] = lambda what: None
) -> list[PreparedTask]:
    """What is asked at every interval, the same on every rank; nothing where there are no intervals."""
    if not experiment.evaluate.every:
        return []
    given = TaskContext(tokenizer, experiment.model.seq_length + 1, experiment.data, root, say)
    return [PreparedTask(task, task.exam(given), task.digest(given)) for task in chosen(experiment, root)]


def evaluate_task(sat: PreparedTask, scorer: Scorer) -> list[Metric]:
    """The metrics of one task; collective where the scorer is. What interrupts the scorer goes through."""
    return evaluate(sat.exam, scorer, portion=max(1, len(sat.exam.asked)))


def metrics_row(sat: PreparedTask, found: list[Metric]) -> dict[str, Any]:
    """The keys of metrics.jsonl: eval/TASK/METRIC, and …_stderr where there is a standard error."""
    name = f"eval/{sat.task.name}"
    values = {f"{name}/{metric.name}": metric.value for metric in found}
    return values | {f"{name}/{metric.name}_stderr": metric.stderr for metric in found if metric.stderr is not None}
