"""What `evaluate` shows: the tasks there are, a bar a task, and a table of figures with their standard errors. Imports no torch."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from research import text as fmt
from research.evaluate_task import Command
from research.evaluation import harness, tasks
from research.evaluation.results import Result
from research.report import Report

COLUMNS = ("task", "metric", "value", "± stderr", "examples", "precision", "time")
RIGHT = ("value", "± stderr", "examples", "time")


def show_tasks() -> None:
    """Every task, and what it is."""
    rows = [
        *tasks.described(),
        (f"{harness.PREFIX}NAME", "a task of lm-evaluation-harness (requirements-eval.txt), --lm_eval_tasks FOLDER"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {what}" for name, what in rows))


@contextlib.contextmanager
def bar(label: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """A bar on standard error, where that is a terminal; one plain line where it is not."""
    with Report(sys.stderr).progress(label, total) as advance:
        yield advance


def say_title(command: Command, known: Sequence[str]) -> None:
    """What is evaluated, and what need not be; on standard error, as all but the figures."""
    again = f" · known already: {', '.join(known)} (--again)" if known else ""
    Report(sys.stderr).header([("", f"evaluate {command.folder.title} · {command.checkpoint.name}{again}")])


def say_kept(path: Path) -> None:
    """Where the figures are."""
    if path.is_file():
        Report(sys.stderr).header([("kept", str(short(path)))])


def say_summary(command: Command, results: Sequence[Result]) -> None:
    """Puts the figures into the W&B summary of a run that has one, and says so."""
    from research import wandb_summary

    if line := wandb_summary.add(command.folder, command.experiment, summary_rows(results)):
        Report(sys.stderr).header([("tracking", line)])


def short(path: Path) -> Path:
    """As one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def show(results: Sequence[Result], as_json: bool) -> None:
    """The figures: a table in a terminal, tab-separated in a pipe, JSON lines where asked for."""
    if as_json:
        print("\n".join(fmt.json_line(result.row()) for result in results))
    elif sys.stdout.isatty():
        Console().print(table(results))
    else:
        print("\n".join("\t".join(row) for row in [COLUMNS, *(row for result in results for row in cells(result))]))


def cells(result: Result) -> list[tuple[str, ...]]:
    """A row a metric; what all of them share is said in the first."""
    first = (f"{result.examples:,}", result.key.precision, fmt.duration(result.seconds))
    rows: list[tuple[str, ...]] = []
    for i, metric in enumerate(result.metrics):
        shared = ("", "", "") if i else first
        rows.append((label(result) if not i else "", metric.name, figure(metric.value), figure(metric.stderr), *shared))
    return rows


def label(result: Result) -> str:
    """The task, and the settings that are not its definition's: lambada (limit 100)."""
    chosen = [f"{name} {value}" for name, value in result.key.settings.items() if value is not None and name != harness.PACKAGE]
    return result.key.task + (f" ({', '.join(chosen)})" if chosen else "")


def figure(value: float | None) -> str:
    """Four decimals; from a thousand on one; '' for None."""
    if value is None or fmt.missing(value):
        return "" if value is None else fmt.missing(value)
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"


def table(results: Sequence[Result]) -> Table:
    """For a terminal: no box, as `runs`."""
    drawn = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in COLUMNS:
        drawn.add_column(column, justify="right" if column in RIGHT else "left", no_wrap=column not in ("task", "metric"))
    for result in results:
        for row in cells(result):
            drawn.add_row(*map(Text, row))
    return drawn


def summary_rows(results: Sequence[Result]) -> dict[str, float]:
    """{'eval/lambada/accuracy': 0.45, …}: a file's task is named without its folder."""
    found: dict[str, float] = {}
    for result in results:
        kind, _, place = label(result).partition(":")
        name = f"{kind}:{place.rpartition('/')[2]}" if place else kind
        found.update({f"eval/{name}/{metric.name}": metric.value for metric in result.metrics})
    return found
