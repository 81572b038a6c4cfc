"""The command line of `evaluate`, and everything that can be refused before torch is imported."""
# MERGED-DOC """What `evaluate` shows: the tasks there are, a bar a task, and a table of figures with their standard errors. Imports no torch."""
# MERGED-DOC """`python -m research evaluate RUN --tasks …`: puts tasks to a trained model and keeps what it found in the run's folder."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from parallel.errors import Mistake
from research import ROOT
from research.cli.trained_run import Trained, find, refuse_launcher, say
from research.cli.verbs import Parser
from research.data.prepare import cache_folder, load_tokenizer
from research.data.tokenizer import Tokenizer
from research.evaluation import lm_eval_task, perplexity, registry
from research.evaluation.lm_eval_task import LMEvalTask
from research.evaluation.results import Key, Result, Results
from research.evaluation.task import Metric, Settings, Task, TaskContext, evaluate
from research.tracking import format as fmt
from research.tracking import run_folder
from research.tracking.console import Console

if TYPE_CHECKING:
    from research.evaluation.session import Session

WHAT = """Puts tasks to a trained model and keeps the figures in RUN/evaluations/step_N.json. A task that was evaluated before, for the
same checkpoint, data and settings, is not run again. Any checkpoint on any number of tensor ranks gives the same figures up to rounding.
docs/evaluating.md says what each is."""
LISTS = ("list", "help")
AT_ONCE = 8192
"""Tokens that are scored at once where --batch does not say it."""


@dataclass(frozen=True)
class Command(Trained):
    """A command that can be carried out."""

    tasks: tuple[Task | LMEvalTask, ...]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's."""
        return load_tokenizer(self.experiment.data, ROOT, say)

    @property
    def batch(self) -> int:
        """Full windows at once."""
        asked = self.arguments.batch
        return max(1, AT_ONCE // self.experiment.model.seq_length) if asked is None else asked

    @property
    def given(self) -> TaskContext:
        """What tasks may use of the model."""
        return TaskContext(self.tokenizer, self.experiment.model.seq_length + 1, self.experiment.data, ROOT, say)


def parser() -> Parser:
    """All options, with words that teach."""
    found = Parser("evaluate", WHAT)
    found.add_argument("run", nargs="?", help="a run's folder (runs/gpt_sotu/latest), its name or its title")
    add = found.add_argument
    add(
        "--tasks",
        nargs="+",
        default=[registry.VALIDATION],
        metavar="TASK",
        help="names, with spaces or commas between; list: shows them all",
    )
    add("--checkpoint", type=int, metavar="STEP", help="the checkpoint of this step (default: the newest)")
    add("--again", action="store_true", help="run tasks again that were evaluated before")
    data = found.add_argument_group("what is asked")
    data.add_argument("--data", type=Path, metavar="FOLDER", help="a folder with wikitext2/test.txt and lambada/test.jsonl")
    data.add_argument("--limit", type=int, metavar="N", help="the first N examples (passages, pairs, questions, windows) of each task")
    data.add_argument("--window", type=int, metavar="W", help="tokens of a window of running text (default: model.seq_length + 1)")
    data.add_argument("--stride", type=int, metavar="S", help="tokens of a window that are scored (default: W − 1, nothing is read twice)")
    data.add_argument("--lm_eval_tasks", type=Path, metavar="FOLDER", help="YAML files for lm_eval:NAME, beside the harness' own")
    data.add_argument(
        "--fewshot", type=int, metavar="K", help="solved examples before each question of lm_eval: tasks (default: the task's)"
    )
    machine = found.add_argument_group("how it is computed")
    machine.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: as trained (fp16 on a CPU: fp32)")
    machine.add_argument("--tensor", type=int, default=1, metavar="T", help="slice the model over T processes of this machine")
    usual = f"what makes {AT_ONCE:,} tokens"
    machine.add_argument(
        "--batch", type=int, metavar="N", help=f"full windows at once, or as many tokens of shorter texts (default: {usual})"
    )
    machine.add_argument("--json", action="store_true", help="the results as JSON lines instead of a table")
    return found


def lists(arguments: argparse.Namespace) -> bool:
    """Whether the tasks are to be shown, and nothing else."""
    return any(name in LISTS for name in names_of(arguments))


def names_of(arguments: argparse.Namespace) -> list[str]:
    """The tasks' names; a comma divides them where what follows it is not part of a file's name."""
    return [
        name for given in arguments.tasks for name in ([given] if Path(given.partition(":")[2]).is_file() else given.split(",")) if name
    ]


def prepared(arguments: argparse.Namespace) -> Command:
    """The command, checked."""
    refuse_launcher("evaluate")
    if arguments.run is None:
        raise Mistake("evaluate needs a run → name one: python -m research evaluate runs/gpt_sotu/latest")
    _refuse_counts(arguments)
    found = find(arguments)
    experiment = found.experiment
    settings = Settings(arguments.limit, arguments.window, arguments.stride, arguments.data)
    perplexity.window_sizes(settings, experiment.model.seq_length + 1)
    wanted = tuple(_task(name, settings, arguments) for name in dict.fromkeys(names_of(arguments)))
    if any(isinstance(task, LMEvalTask) for task in wanted):
        lm_eval_task.keep_offline((ROOT / experiment.data.cache).expanduser() / "lm_eval")
    return Command(**vars(found), tasks=wanted)


def _task(name: str, settings: Settings, arguments: argparse.Namespace) -> Task | LMEvalTask:
    if name.startswith(lm_eval_task.PREFIX):
        return lm_eval_task.named(name, settings, arguments.lm_eval_tasks, arguments.fewshot)
    (task,) = registry.named([name], settings)
    return task


def _refuse_counts(arguments: argparse.Namespace) -> None:
    for name in ("limit", "batch", "tensor"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise Mistake(f"--{name} {value} does not work → use 1 or more")
    if arguments.fewshot is not None and arguments.fewshot < 0:
        raise Mistake(f"--fewshot {arguments.fewshot} does not work → use 0 or more")


COLUMNS = ("task", "metric", "value", "± stderr", "examples", "precision", "time")
RIGHT = ("value", "± stderr", "examples", "time")


def show_tasks() -> None:
    """Every task, and what it is."""
    rows = [
        *registry.described(),
        (f"{lm_eval_task.PREFIX}NAME", "a task of lm-evaluation-harness (requirements-eval.txt), --lm_eval_tasks FOLDER"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {what}" for name, what in rows))


@contextlib.contextmanager
def bar(label: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """A bar on standard error, where that is a terminal; one plain line where it is not."""
    with Console(sys.stderr).progress(label, total) as advance:
        yield advance


def say_title(command: Command, known: Sequence[str]) -> None:
    """What is evaluated, and what need not be; on standard error, as all but the figures."""
    again = f" · known already: {', '.join(known)} (--again)" if known else ""
    Console(sys.stderr).header([("", f"evaluate {command.folder.title} · {command.checkpoint.name}{again}")])


def say_kept(path: Path) -> None:
    """Where the figures are."""
    if path.is_file():
        Console(sys.stderr).header([("kept", str(short(path)))])


def say_summary(command: Command, results: Sequence[Result]) -> None:
    """Puts the figures into the W&B summary of a run that has one, and says so."""
    from research.tracking import wandb_summary

    if line := wandb_summary.add(command.folder, summary_rows(results)):
        Console(sys.stderr).header([("tracking", line)])


def short(path: Path) -> Path:
    """As one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def show(results: Sequence[Result], as_json: bool) -> None:
    """The figures: a table in a terminal, tab-separated in a pipe, JSON lines where asked for."""
    if as_json:
        print("\n".join(fmt.json_line(result.row()) for result in results))
    elif sys.stdout.isatty():
        RichConsole().print(table(results))
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
    chosen = [f"{name} {value}" for name, value in result.key.settings.items() if value is not None and name != lm_eval_task.PACKAGE]
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


Asked = Task | LMEvalTask


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
    from research.generation.restore import PRECISIONS, dtype_of

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
    if isinstance(task, LMEvalTask):
        with bar(task.name, None) as advance, cache_folder(command.experiment.data.cache, ROOT) as cache:
            return task.evaluated(session, cache / "lm_eval", advance)
    exam = task.exam(command.given)
    with bar(task.name, len(exam.asked)) as advance:
        return evaluate(exam, session.scorer, advance), exam.examples
