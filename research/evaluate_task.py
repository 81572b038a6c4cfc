"""The command line of `evaluate`, and everything that can be refused before torch is imported."""

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from parallel.errors import Mistake
from research.data.prepare import load_tokenizer
from research.data.tokenizer import Tokenizer
from research.evaluation import harness, offline, tasks, windows
from research.evaluation.harness import HarnessTask
from research.evaluation.task import Given, Settings, Task
from research.trained import ROOT, Trained, find, refuse_launcher, say
from research.verbs import Parser

WHAT = """Puts tasks to a trained model and keeps the figures in RUN/evaluations/step_N.json. A task that was evaluated before, for the
same checkpoint, data and settings, is not run again. Any checkpoint on any number of tensor ranks gives the same figures up to rounding.
docs/evaluating.md says what each is."""
LISTS = ("list", "help")
AT_ONCE = 8192
"""Tokens that are scored at once where --batch does not say it."""


@dataclass(frozen=True)
class Command(Trained):
    """A command that can be carried out."""

    tasks: tuple[Task | HarnessTask, ...]

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
    def given(self) -> Given:
        """What tasks may use of the model."""
        return Given(self.tokenizer, self.experiment.model.seq_length + 1, self.experiment.data, ROOT, say)


def parser() -> Parser:
    """All options, with words that teach."""
    found = Parser("evaluate", WHAT)
    found.add_argument("run", nargs="?", help="a run's folder (runs/gpt_sotu/latest), its name or its title")
    add = found.add_argument
    add("--tasks", nargs="+", default=[tasks.VALIDATION], metavar="TASK", help="names, with spaces or commas between; list: shows them all")
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
    windows.sizes(settings, experiment.model.seq_length + 1)
    wanted = tuple(_task(name, settings, arguments) for name in dict.fromkeys(names_of(arguments)))
    if any(isinstance(task, HarnessTask) for task in wanted):
        offline.keep_offline((ROOT / experiment.data.cache).expanduser() / "lm_eval")
    return Command(**vars(found), tasks=wanted)


def _task(name: str, settings: Settings, arguments: argparse.Namespace) -> Task | HarnessTask:
    if name.startswith(harness.PREFIX):
        return harness.named(name, settings, arguments.lm_eval_tasks, arguments.fewshot)
    (task,) = tasks.named([name], settings)
    return task


def _refuse_counts(arguments: argparse.Namespace) -> None:
    for name in ("limit", "batch", "tensor"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise Mistake(f"--{name} {value} does not work → use 1 or more")
    if arguments.fewshot is not None and arguments.fewshot < 0:
        raise Mistake(f"--fewshot {arguments.fewshot} does not work → use 0 or more")
