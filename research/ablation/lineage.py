"""The lineage of experiments: which folder was copied from which, what each declares to change, and what really differs.

Imports no torch. Loading an experiment runs its config.py; variant.py is only read.
"""

import ast
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from parallel.errors import Mistake, listed, listed_up_to, nearest
from research import ROOT
from research.ablation.source_text import literal
from research.cluster.environment import ALONE
from research.config import Experiment
from research.config.checks import check
from research.config.diff import PLUMBING, Change, belongs, describe_changes, diff
from research.config.experiment_folder import CONFIG, VARIANTS, check_variants, load, variant_names
from research.config.schema import MEASURE
from research.tracking.format import plural

EXPERIMENTS = ROOT / "experiments"
LONGEST = 400
"""The most characters of a list of changes in one sentence."""


@dataclass(frozen=True)
class Member:
    """An experiment's folder as it is found: loaded, or why it cannot be."""

    folder: Path
    experiment: Experiment | None
    problem: str = ""
    """The sentence that loading ended in; '' if the experiment was loaded."""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.name


class Family:
    """The experiments of one folder, loaded when they are asked for."""

    def __init__(self, root: Path = EXPERIMENTS) -> None:
        self.root = root
        self._loaded: dict[str, Member] = {}

    @cached_property
    def names(self) -> list[str]:
        """The names of all folders that are experiments, or should be."""
        if not self.root.is_dir():
            raise Mistake(f"there is no folder {self.root} → name an experiment's folder")
        folders = (path for path in self.root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
        return sorted(path.name for path in folders)

    def member(self, name: str) -> Member:
        """The experiment of this name; its folder is there."""
        if name not in self._loaded:
            folder = self.root / name
            try:
                self._loaded[name] = Member(folder, load(folder).experiment)
            except Mistake as mistake:
                self._loaded[name] = Member(folder, None, str(mistake))
        return self._loaded[name]

    def children(self, name: str) -> list[str]:
        """The names of the experiments whose parent this is."""
        members = [self.member(other) for other in self.names]
        return [member.name for member in members if member.experiment is not None and member.experiment.parent == name]


def folder_of(handle: str | Path, root: Path = EXPERIMENTS) -> Path:
    """The experiment's folder that a person names: by its path, or by the bare name of a folder in experiments/."""
    for path in (Path(handle), root / handle):
        if (path / CONFIG).is_file():
            return path
    names = sorted(path.parent.name for path in root.glob(f"*/{CONFIG}"))
    near = nearest(Path(handle).name, names)
    raise Mistake(f"{handle} has no {CONFIG} → " + (f"did you mean {root.name}/{near}?" if near else f"use {listed(names[:8])}"))


def differences(then: Experiment, then_variant: bytes | None, now: Experiment, now_variant: bytes | None) -> list[Change]:
    """What differs between two experiments and affects results: settings by dotted name, and variant.py if a setting names any of it.

    The variants are the contents of variant.py; None where there is no such file.
    """
    changes = [change for change in diff(then, now) if not belongs(change[0], PLUMBING)]
    if then_variant != now_variant and {*variant_names(then), *variant_names(now)} - {MEASURE}:
        old, new = ("missing" if text is None else plural(len(text.splitlines()), "line") for text in (then_variant, now_variant))
        changes.append((VARIANTS, old, new))
    return changes


def differences_from(parent: Member, child: Member) -> list[Change]:
    """`differences` of two experiments that were loaded."""
    assert parent.experiment is not None and child.experiment is not None
    then, now = (path.read_bytes() if (path := member.folder / VARIANTS).is_file() else None for member in (parent, child))
    return differences(parent.experiment, then, child.experiment, now)


def refuse_unlaunchable(folder: Path, experiment: Experiment) -> None:
    """Raises a Mistake if the settings do not fit the smallest world of their own layout, or name something that variant.py lacks."""
    world = experiment.parallel.pipe * experiment.parallel.tensor
    check(experiment, replace(ALONE, world=world, local_world=world))
    check_variants(folder, experiment)
    names = variant_names(experiment)
    defined = _defined(folder / VARIANTS) if names else set()
    for setting, name in names.items():
        if name not in defined:
            near = nearest(name, defined)
            way_out = f"did you mean {near}?" if near else f"write {name} there, or name one of {listed(sorted(defined)) or 'none'}"
            raise Mistake(f"{setting} = 'variant:{name}', and {folder.name}/{VARIANTS} defines no {name} → {way_out}")


def _defined(path: Path) -> set[str]:
    """The names that a Python file defines at its top. The file is not run."""
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise Mistake(f"{path.parent.name}/{path.name}{line}: {getattr(error, 'msg', error)} → correct the Python there") from None
    blocks = (node for node in ast.walk(tree) if not isinstance(node, ast.expr))
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {node.name for node in blocks if isinstance(node, kinds)} | stored


def problems(member: Member, family: Family) -> list[str]:
    """What is wrong with an experiment, each as a sentence that says what to write; none if all is well."""
    if member.experiment is None:
        return [member.problem]
    shown, experiment = _shown(member.folder), member.experiment
    found = []
    try:
        refuse_unlaunchable(member.folder, experiment)
    except Mistake as mistake:
        found.append(f"{shown}: {mistake}")
    if experiment.parent is None:
        return found + _problems_of_root(member, family)

    # the parent, and its own parents
    if experiment.parent == member.name or experiment.parent not in family.names:
        near = nearest(experiment.parent, [name for name in family.names if name != member.name])
        way_out = f"did you mean {near!r}?" if near else "name the folder beside it that it was copied from, or write parent=None"
        where = "itself" if experiment.parent == member.name else f"no folder in {_shown(family.root)}"
        return [*found, f"{shown}: parent = {experiment.parent!r} is {where} → {way_out}"]
    if circle := _circle(member, family):
        return [*found, f"{shown}: its parents lead back to it, {' → '.join(circle)} → write parent=None in the first of them"]
    parent = family.member(experiment.parent)
    if parent.experiment is None:
        return [*found, f"{shown}: its parent {parent.name} does not load: {parent.problem}"]
    return found + _problems_of_changes(member, parent)


def _problems_of_changes(member: Member, parent: Member) -> list[str]:
    """Where what an experiment declares is not what differs from its parent."""
    assert member.experiment is not None
    shown, changes = _shown(member.folder), differences_from(parent, member)
    declared, differing = member.experiment.changes, [name for name, _, _ in changes]
    write = f"write changes={literal(tuple(differing))}"
    found = []
    if hidden := [change for change in changes if change[0] not in declared]:
        what = describe_changes(hidden)
        what = what if len(what) <= LONGEST else listed_up_to([name for name, _, _ in hidden], 20)
        found.append(f"{shown} differs from {parent.name} in {what}, which changes does not declare → {write}, or put it back")
    if idle := [name for name in declared if name not in differing]:
        plumbing = [name for name in idle if belongs(name, PLUMBING)]
        why = f" ({listed(plumbing, 'and')} affects no result and is not declared)" if plumbing else ""
        found.append(f"{shown} declares {listed(idle, 'and')} but has what {parent.name} has there{why} → {write}")
    if len(set(declared)) < len(declared):
        found.append(f"{shown} declares a change twice: {listed(declared, 'and')} → {write}")
    return found


def _problems_of_root(member: Member, family: Family) -> list[str]:
    """What is wrong with an experiment without a parent: it declares changes, or was copied by hand and does not say so."""
    assert member.experiment is not None
    shown = _shown(member.folder)
    if member.experiment.changes:
        return [f"{shown} declares {listed(member.experiment.changes, 'and')} and has parent = None → name its parent, or write changes=()"]
    roots = [root for name in family.names if (root := family.member(name)).experiment is not None and root.experiment.parent is None]
    own = member.experiment.question, member.experiment.init_from  # two imports may ask the same of two checkpoints
    alike = [root for root in roots if root.experiment is not None and (root.experiment.question, root.experiment.init_from) == own]
    original = min(alike, key=lambda root: _age(root, family), default=member)
    if original.name == member.name:
        return []
    changes = tuple(name for name, _, _ in differences_from(original, member))
    write = f"write parent={literal(original.name)}, changes={literal(changes)} and a question of its own"
    return [f"{shown} asks what {original.name} asks, word for word, and has parent = None → if it is a copy, {write}"]


def _age(root: Member, family: Family) -> tuple[int, int, str]:
    """Sorts the original before its copies: it has forks, its config.py is older."""
    return -len(family.children(root.name)), (root.folder / CONFIG).stat().st_mtime_ns, root.name


def _circle(member: Member, family: Family) -> list[str]:
    """The names from an experiment over its parents back to it; [] if they end elsewhere."""
    trail, parent = [member.name], member.experiment.parent if member.experiment else None
    while parent in family.names and len(trail) <= len(family.names):
        trail.append(parent)
        if parent == member.name:
            return trail
        experiment = family.member(parent).experiment
        parent = experiment.parent if experiment else None
    return []


def families_of(handles: Iterable[str]) -> list[tuple[Family, str]]:
    """(the folder of experiments, the name in it) of each experiment that a person names."""
    families: dict[Path, Family] = {}
    found = []
    for handle in handles:
        folder = folder_of(handle).resolve()
        found.append((families.setdefault(folder.parent, Family(folder.parent)), folder.name))
    return found


def _shown(path: Path) -> str:
    """The path as one would type it here."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)
