"""The forest of experiments: who was forked from whom, what each changes, and the best result of its runs. Imports no torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import Mistake
from research import ROOT
from research.ablation import results
from research.ablation.lineage import Family, Member, differences, differences_from
from research.config import serialization
from research.config.diff import Change, shown
from research.config.experiment_folder import RESULTS, VARIANTS
from research.tracking import format as fmt
from research.tracking import metrics, run_folder
from research.tracking.run_folder import RunFolder

SAME = "nothing that affects results"
BITS, STEP = "val/bits_per_byte", "progress/step"
BEST = "\n## Results\n"
"""What heads the part of experiments/README.md that depends on the runs of this machine."""
HEAD = """# Experiments

`python -m research tree --markdown` writes this file: do not edit it. [docs/ablations.md](../docs/ablations.md) says how an experiment is
forked and what is said of it here: the settings in which it differs from the one above it, the question that it answers, and the answer
that `python -m research ablate` has found, if there is one.

"""


@dataclass(frozen=True)
class Result:
    """The best validation of an experiment's runs, among those that have its settings."""

    bits_per_byte: float | None
    """None if no run has them."""
    step: int
    run: str
    """The id of the run that reached it."""
    runs: int
    """Runs with the experiment's settings and at least one validation; the seed may be another one."""
    others: int
    """Runs of the same name with other settings, which the command line gave them."""


@dataclass(frozen=True)
class Tree:
    """An experiment and the experiments that were forked from it."""

    member: Member
    changes: list[Change] | None
    """What differs from its parent and affects results; None if it begins a tree."""
    result: Result | None
    ablation: results.Result | None
    """The comparison with its parent that is kept in its folder."""
    forks: "list[Tree]"


def forest(family: Family, names: list[str] | None = None, root: Path = ROOT, with_results: bool = True) -> list[Tree]:
    """The trees of the experiments `names` (None: all). An experiment whose parent is not among them begins a tree."""
    members = {name: family.member(name) for name in (family.names if names is None else names)}
    left = dict(members)

    def tree(name: str) -> Tree:
        member = left.pop(name)
        parent = members.get(_parent(member))
        both = parent is not None and parent.experiment is not None and member.experiment is not None
        changes = differences_from(parent, member) if both and parent is not None else None
        forks = [tree(other) for other in members if other in left and _parent(members[other]) == name]
        ablation = results.read(parent, member) if changes is not None and parent is not None else None
        return Tree(member, changes, result_of(member, root) if with_results else None, ablation, forks)

    trees = [tree(name) for name in members if _parent(members[name]) not in members and name in left]
    return trees + [tree(name) for name in members if name in left]  # parents in a circle


def _parent(member: Member) -> str:
    return (member.experiment.parent or "") if member.experiment is not None else ""


def result_of(member: Member, root: Path = ROOT) -> Result | None:
    """The best validation of the runs that have the experiment's settings; None if it has no runs. Damaged runs are passed over."""
    if member.experiment is None:
        return None
    path = member.folder / VARIANTS
    variant = path.read_bytes() if path.is_file() else None
    best: list[tuple[float, int, str]] = []
    others = 0
    for folder in run_folder.of_experiment(root / member.experiment.track.runs / member.name):
        try:
            saved = folder.source / VARIANTS
            then = serialization.load(folder.config)
            changes = differences(then, saved.read_bytes() if saved.is_file() else None, member.experiment, variant)
            if any(name != "seed" for name, _, _ in changes):
                others += 1
            elif (found := best_of(folder)) is not None:
                best.append((*found, folder.id))
        except (OSError, ValueError):  # a Mistake is one
            continue
    if not best:
        return Result(None, 0, "", 0, others) if others else None
    bits, step, run = min(best)
    return Result(bits, step, run, len(best), others)


def best_of(folder: RunFolder) -> tuple[float, int] | None:
    """(bits per byte, step) of a run's best validation."""
    rows = [(row[BITS], row.get(STEP)) for row in metrics.read(folder.metrics) if _is_number(row.get(BITS))]
    return min(((bits, step if isinstance(step, int) else 0) for bits, step in rows), default=None)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def describe(result: Result) -> str:
    """'best 2.076 bits/byte at step 270 of 073808 · 3 runs, and 2 with other settings'."""
    if result.bits_per_byte is None:
        return f"no run has these settings · {fmt.plural(result.others, 'run')} with others"
    others = f", and {result.others:,} with other settings" if result.others else ""
    return (
        f"best {fmt.loss(result.bits_per_byte)} bits/byte at step {result.step} of {result.run} · {fmt.plural(result.runs, 'run')}{others}"
    )


def walk(trees: list[Tree], depth: int = 0) -> Iterator[tuple[int, Tree]]:
    """(depth, tree) of every experiment, parents before their forks."""
    for tree in trees:
        yield depth, tree
        yield from walk(tree.forks, depth + 1)


def markdown(trees: list[Tree]) -> str:
    """The text of experiments/README.md."""
    lines = []
    for depth, tree in walk(trees):
        member = tree.member
        changed = ", ".join(_changed(*change) for change in tree.changes or ())
        if member.experiment is None:
            said = f"does not load: {_escaped(member.problem)}"
        else:
            said = _escaped(" ".join(member.experiment.question.split()))
        same = SAME if tree.changes == [] else ""
        parts = [f"[{member.name}]({member.name}/)", *filter(None, [changed or same]), said]
        if tree.ablation is not None:
            parts.append(f"[{_escaped(tree.ablation.description)}]({member.name}/{RESULTS}/compare.md)")
        lines.append(f"{'  ' * depth}- {' · '.join(parts)}\n")
    text = HEAD + "".join(lines)
    if results := [(tree.member.name, found) for _, tree in walk(trees) if (found := tree.result) is not None and found.runs]:
        rows = [f"| {name} | {fmt.loss(found.bits_per_byte)} | {found.step} | {found.runs} |\n" for name, found in results]
        text += f"{BEST}\n| experiment | best bits per byte | at step | runs |\n|---|---|---|---|\n{''.join(rows)}"
    return text


def _changed(name: str, then: object, now: object) -> str:
    return f"`{name}` {_escaped(str(shown(name, then)))} → {_escaped(str(shown(name, now)))}" if name != VARIANTS else f"`{name}`"


def _escaped(text: str) -> str:
    for letter in "\\`*[]<>|":
        text = text.replace(letter, f"\\{letter}")
    return text


def refuse_unloadable(trees: list[Tree]) -> None:
    """Raises a Mistake if an experiment does not load: a written file would say so for good."""
    for _, tree in walk(trees):
        if tree.member.experiment is None:
            raise Mistake(tree.member.problem)
