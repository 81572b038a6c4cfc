"""The tasks of `evaluate.tasks`, which are evaluated periodically during training: checked before torch, tokenized before step 1."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from research.config import Experiment
from research.data.records import Progress, silent
from research.data.tokenizer import Tokenizer
from research.evaluation import registry
from research.evaluation.scorer import Scorer
from research.evaluation.task import Metric, Settings, Task, TaskContext, TaskRequests, TextTask, evaluate


@dataclass(frozen=True)
class PreparedTask:
    """A task and its requests, made with the run's tokenizer."""

    task: Task
    requests: TaskRequests
    digest: str
    """SHA-256 of the task's data."""


def check_tasks(experiment: Experiment, root: Path) -> None:
    """Raises a Mistake for unknown tasks, missing files, and an interval without anything to do. Reads no file."""
    settings = experiment.evaluate
    if settings.every and not settings.tasks and not settings.measure:
        raise Mistake(
            f"evaluate.every = {settings.every}, but evaluate.tasks is empty → name some, e.g. {registry.VALIDATION}, or use every 0"
        )
    create_tasks(experiment, root)


def create_tasks(experiment: Experiment, root: Path) -> list[Task]:
    """The experiment's tasks, not read yet; relative paths start from `root`. A Mistake if one of them generates texts."""
    settings = experiment.evaluate
    data = Path(settings.data) if settings.data else None
    tasks: list[Task] = []
    for task in registry.create_tasks(settings.tasks, Settings(limit=settings.limit or None, data=data, root=root)):
        if isinstance(task, TextTask):
            raise Mistake(
                f"evaluate.tasks: {task.name} lets the model write texts, which is not done while it trains → evaluate it afterwards: "
                f"python -m research evaluate RUN --tasks {task.name}"
            )
        tasks.append(task)
    return tasks


def prepare_tasks(experiment: Experiment, root: Path, tokenizer: Tokenizer, progress: Progress = silent) -> list[PreparedTask]:
    """Reads and tokenizes the experiment's tasks, the same on every rank. Empty if evaluate.every is 0."""
    if not experiment.evaluate.every:
        return []
    context = TaskContext(tokenizer, experiment.model.seq_length + 1, experiment.data, root, progress)
    return [PreparedTask(task, task.requests(context), task.digest(context)) for task in create_tasks(experiment, root)]


def evaluate_task(prepared: PreparedTask, scorer: Scorer) -> list[Metric]:
    """The metrics of one task, from one call of the scorer: a live one forms its own batches. Collective if the scorer is."""
    return evaluate(prepared.requests, scorer, batch_size=max(1, len(prepared.requests.requests)))


def metrics_row(prepared: PreparedTask, metrics: list[Metric]) -> dict[str, Any]:
    """The metrics as a row of metrics.jsonl: eval/TASK/METRIC, and eval/TASK/METRIC_stderr if there is a standard error."""
    name = f"eval/{prepared.task.name}"
    values = {f"{name}/{metric.name}": metric.value for metric in metrics}
    return values | {f"{name}/{metric.name}_stderr": metric.stderr for metric in metrics if metric.stderr is not None}
