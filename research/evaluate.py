"""`python -m research evaluate RUN --tasks …`: puts tasks to a trained model and keeps what it found in the run's folder."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from research import run_folder
from research.data.prepare import cache_folder
from research.evaluate_output import bar, say_kept, say_summary, say_title, show, show_tasks
from research.evaluate_task import ROOT, Command, lists, parser, prepared
from research.evaluation.answers import answered
from research.evaluation.harness import HarnessTask
from research.evaluation.results import Key, Result, Results
from research.evaluation.task import Metric, Task

if TYPE_CHECKING:
    from research.evaluation.session import Session

Asked = Task | HarnessTask


def main(argv: list[str]) -> None:
    """Prints the table. What was finished before Ctrl-C or a mistake is kept, shown, and not run again."""
    arguments = parser().parse_args(argv)
    if lists(arguments):
        show_tasks()
        return
    command = prepared(arguments)
    results = Results(command.folder, command.checkpoint)
    keys = keys_of(command)
    new = [task for task, key in keys.items() if arguments.again or results.of(key) is None]
    say_title(command, [task.name for task in keys if task not in new])
    done: list[Asked] = []
    try:
        if new:
            _evaluate(command, {task: keys[task] for task in new}, results, done)
    finally:
        show([found for key in keys.values() if (found := results.of(key))], arguments.json)
        say_kept(results.path)
        if done:
            say_summary(command, results.every())


def keys_of(command: Command) -> dict[Asked, Key]:
    """What decides the figures of each task."""
    given, precision = command.given, precision_of(command)
    return {task: Key(task.name, task.settings, task.digest(given), given.tokenizer.fingerprint, precision) for task in command.tasks}


def precision_of(command: Command) -> str:
    """What the model will compute in. torch begins here."""
    from parallel.distributed import device
    from research.restore import PRECISIONS, dtype_of

    found = dtype_of(command.arguments.precision, command.experiment.precision, device())
    return next(name for name, dtype in PRECISIONS.items() if dtype == found)


def _evaluate(command: Command, keys: Mapping[Asked, Key], results: Results, done: list[Asked]) -> None:
    """The tasks one after the other, each kept as soon as it is finished."""
    from research.evaluation.session import Session

    arguments, model = command.arguments, command.experiment.model
    how = (arguments.precision, arguments.tensor, command.batch)
    with Session(command.folder.path, command.checkpoint, model, command.tokenizer, *how) as session:
        for task, key in keys.items():
            began = time.monotonic()
            metrics, examples = _figures(task, command, session)
            seconds = round(time.monotonic() - began, 1)
            results.add(Result(key, tuple(metrics), examples, seconds, arguments.tensor, command.batch, run_folder.now()))
            done.append(task)


def _figures(task: Asked, command: Command, session: "Session") -> tuple[list[Metric], int]:
    if isinstance(task, HarnessTask):
        with bar(task.name, None) as advance, cache_folder(command.experiment.data.cache, ROOT) as cache:
            return task.evaluated(session, cache / "lm_eval", advance)
    exam = task.exam(command.given)
    with bar(task.name, len(exam.asked)) as advance:
        return answered(exam, session.scorer, advance), exam.examples
