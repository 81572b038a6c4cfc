"""`python -m research tree`: the forest of experiments, what each changes, and the best result of its runs. Imports no torch."""

import sys
import textwrap
from dataclasses import asdict
from typing import Any

from parallel.files import published
from parallel.text import printable
from research.ablation import forest
from research.ablation.forest import Tree
from research.ablation.lineage import Family
from research.cli.json_output import add_json_option, print_json
from research.cli.verbs import Parser
from research.config.diff import describe_changes
from research.tracking.console import Console
from research.tracking.format import short_path

WHAT = """Shows which experiment was forked from which, the settings that affect results in which each differs from its parent, the
comparison with its parent if `ablate` has made one, and the best validation of its runs. Runs count if they have the experiment's settings,
whatever their seed; runs with other settings that the command line gave them are counted apart."""
README = "README.md"
NARROWEST = 30
"""Columns that a text has at least, however deep in the forest."""
LONGEST = 600
"""The most characters of the changes of one experiment."""


def main(argv: list[str]) -> None:
    """Prints the forest, or writes experiments/README.md."""
    parser = Parser("tree", WHAT)
    parser.add_argument("--markdown", action="store_true", help=f"write experiments/{README} instead")
    add_json_option(parser, "the forest, parents before their forks,")
    arguments = parser.parse_args(argv)
    family, console = Family(), Console(sys.stderr) if arguments.json else Console()
    trees = forest.forest(family)
    if arguments.json:
        print_json([as_json(tree) for _, tree in forest.walk(trees)])
        return
    if not arguments.markdown:
        console.lines(printable(line) for line in lines(trees, console.width))
        return
    forest.refuse_unloadable(trees)
    path = family.root / README
    with published(path) as temporary:
        temporary.write_text(forest.markdown(trees), encoding="utf-8")
    console.header([("written", short_path(path))])


def as_json(tree: Tree) -> dict[str, Any]:
    """What is said of an experiment, as JSON data."""
    member, changes = tree.member, tree.changes
    return {
        "experiment": member.name,
        "parent": member.experiment and member.experiment.parent,
        "question": member.experiment and member.experiment.question,
        "problem": member.problem or None,
        "changes": None if changes is None else [{"setting": name, "parent": then, "fork": now} for name, then, now in changes],
        "ablation": tree.ablation and asdict(tree.ablation),
        "runs": tree.result and asdict(tree.result),
    }


def lines(trees: list[Tree], width: int) -> list[str]:
    """The forest as lines of at most `width` columns, as far as the stems leave room."""
    return [line for tree in trees for line in (tree.member.name, *_below(tree, width, ""))]


def _below(tree: Tree, width: int, stem: str) -> list[str]:
    """The lines below an experiment's name: what is said of it, then its forks. `stem` are the lines of the trees that go on below."""
    found = []
    rail = stem + ("│  " if tree.forks else "   ")
    for text in said_of(tree):
        columns = max(width, len(rail) + NARROWEST)
        found += textwrap.wrap(text, columns, initial_indent=rail, subsequent_indent=f"{rail}  ", break_on_hyphens=False)
    for number, fork in enumerate(tree.forks, 1):
        is_last = number == len(tree.forks)
        found.append(f"{stem}{'└─ ' if is_last else '├─ '}{fork.member.name}")
        found += _below(fork, width, stem + ("   " if is_last else "│  "))
    return found


def said_of(tree: Tree) -> list[str]:
    """What is said of an experiment: its changes, or its question where it begins a tree, and its result."""
    member = tree.member
    if member.experiment is None:
        return [f"does not load: {member.problem}"]
    if tree.changes is None:
        lost = f" (its parent {member.experiment.parent} is not here)" if member.experiment.parent is not None else ""
        first = f"{member.experiment.question}{lost}"
    else:
        first = describe_changes(tree.changes) or forest.SAME
        first = first if len(first) <= LONGEST else f"{first[: LONGEST - 1]}…"
    answer = [tree.ablation.description] if tree.ablation is not None else []
    return [" ".join(first.split()), *answer, *([forest.describe(tree.result)] if tree.result is not None else [])]
