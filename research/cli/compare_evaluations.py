"""`compare --metric eval/TASK/METRIC`: metrics that `evaluate` has kept in the folders of the runs. Imports no torch."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from parallel.checkpoint.folder import name_of
from parallel.errors import Mistake
from research.ablation.comparison import AXES
from research.ablation.sides import FinishedRun, Side
from research.cli.evaluate import summary_rows
from research.evaluation import results
from research.evaluation.results import Result

GROUP = "eval/"
PLACES = tuple(axis.key for axis in AXES.values())
"""The columns that say where in a run a row is."""
MUST_EQUAL = {"settings": "settings", "data_sha256": "examples", "code_sha256": "code of the evaluation"}
"""What must be equal for two results to be compared -> what to call it. The name of the metric says the task."""


def with_evaluations(sides: Sequence[Side], metric: str) -> list[Side]:
    """The sides. A run whose training did not log the metric gets it from the evaluation of its last checkpoint, as its last row.

    Raises a Mistake if two runs were evaluated on other examples, with other settings, or by other code.
    """
    if not metric.startswith(GROUP):
        return list(sides)
    first: tuple[FinishedRun, Result] | None = None
    found = []
    for side in sides:
        runs = {}
        for seed, run in side.runs.items():
            runs[seed] = run
            if any(metric in row for row in run.rows) or not (known := _at_the_end(run, metric)):
                continue
            result, value = known
            if first is None:
                first = run, result
            _refuse_other(metric, first, (run, result))
            runs[seed] = replace(run, rows=[*run.rows, _last_place(run) | {metric: value}])
        found.append(replace(side, runs=runs))
    if first is not None:
        _refuse_unevaluated(found, metric, first[1].key.task)
    return found


def _at_the_end(run: FinishedRun, metric: str) -> tuple[Result, float] | None:
    """The metric of the checkpoint after the run's last step, and the result that it is part of; None if there is none."""
    last = name_of(int(_last_place(run).get("progress/step", 0)))
    known = results.of_checkpoint(run.folder, last)
    found = [(one, value) for one in known if (value := summary_rows([one]).get(metric)) is not None]
    return found[-1] if found else None


def _last_place(run: FinishedRun) -> dict[str, Any]:
    """Where the run ended: its last row that says so."""
    place: dict[str, Any] = {}
    for row in run.rows:
        place |= {name: row[name] for name in PLACES if row.get(name) is not None}
    return place


def _refuse_other(metric: str, one: tuple[FinishedRun, Result], other: tuple[FinishedRun, Result]) -> None:
    for name, called in MUST_EQUAL.items():
        if getattr(one[1].key, name) != getattr(other[1].key, name):
            titles = " and ".join(run.folder.title for run, _ in (one, other))
            again = f"python -m research evaluate RUN --tasks {one[1].key.task} --again"
            raise Mistake(f"{metric} of {titles} was computed with different {called} → evaluate both again: {again}")


def _refuse_unevaluated(sides: Sequence[Side], metric: str, task: str) -> None:
    for side in sides:
        for run in side.runs.values():
            if not any(metric in row for row in run.rows):
                raise Mistake(
                    f"{run.folder.title} was not evaluated on {task} → python -m research evaluate {run.folder.title} --tasks {task}"
                )
