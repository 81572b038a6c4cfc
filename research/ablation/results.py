"""The result of an ablation: what `ablate` writes into results/ of a fork, to be committed with it. Imports no torch.

ablation.json there holds the verdict, and the settings of both experiments, so that a result can be told to be out of date.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel import regular_files
from parallel.errors import Mistake
from parallel.files import write_json
from research.ablation import report
from research.ablation.comparison import Comparison
from research.ablation.lineage import Family, Member
from research.config import serialization
from research.config.diff import PLUMBING, belongs, describe_changes, flatten
from research.config.experiment_folder import RESULTS, VARIANTS, variant_names
from research.config.schema import MEASURE
from research.tracking.format import plural, short_path
from research.tracking.metrics import finite

FILE = "ablation.json"
WAY_OUT = "make it again: python -m research ablate"
LARGEST = 2**20
"""The most bytes of an ablation.json; one has about 10,000."""


@dataclass(frozen=True)
class Result:
    """What a fork's results/ says of it."""

    verdict: str
    """'better', 'worse' or 'not distinguishable'."""
    difference: str
    """The mean difference from the parent with its sign, and the 95 % interval if there are two seeds or more."""
    metric: str
    seeds: int
    settings: tuple[str, ...]
    """Settings that all runs were given on the command line."""
    outdated: str
    """What has changed since in the fork or its parent and affects results, for the middle of a sentence; '' if nothing has."""

    @property
    def description(self) -> str:
        """'worse by +0.0312 (0.0210 to 0.0415) val/bits_per_byte, 3 seeds'."""
        by = "" if self.verdict == "not distinguishable" else " by"
        given = f", with {' '.join(self.settings)}" if self.settings else ""
        return f"{self.verdict}{by or ':'} {self.difference} {self.metric}, {plural(self.seeds, 'seed')}{given}"


def save(out: Path, parent: Member, fork: Member, comparison: Comparison, settings: tuple[str, ...]) -> None:
    """Writes ablation.json. `settings`: what all runs were given on the command line. The comparison has one variant, the fork."""
    (variant,) = comparison.variants
    out.mkdir(parents=True, exist_ok=True)
    found = {name: value for name, value in report.variant_as_json(comparison, variant).items() if name != "changes"}
    trained = {"settings": list(settings), "parent": _as_json(parent), "fork": _as_json(fork)}
    write_json(out / FILE, finite(found | trained))


def _as_json(member: Member) -> dict[str, Any]:
    assert member.experiment is not None
    return {"name": member.name, "config": serialization.resolved(member.experiment), VARIANTS: _digest(member)}


def _digest(member: Member) -> str | None:
    """SHA-256 (hex) of variant.py; None if there is none."""
    path = member.folder / VARIANTS
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def read_table(folder: Path) -> dict[str, Any]:
    """The JSON data that `save` has written into a folder. A Mistake if they are damaged, an OSError if there are none."""
    return regular_files.read_table(folder / FILE, f"{WAY_OUT} {folder.parent.name}", LARGEST)


def read(parent: Member, fork: Member) -> Result | None:
    """The result of a fork; None if it has none. A Mistake if its ablation.json is damaged."""
    path = fork.folder / RESULTS / FILE
    if not path.is_file():
        return None
    try:
        table = read_table(path.parent)
        mean, low, high = (table[name] for name in ("difference", "low", "high"))
        interval = f" ({low:+.4f} to {high:+.4f})" if isinstance(low, float) and math.isfinite(low) else ""
        return Result(
            verdict=str(table["verdict"]),
            difference=f"{mean:+.4f}{interval}",
            metric=str(table["metric"]),
            seeds=int(table["pairs"]),
            settings=tuple(map(str, table["settings"])),
            outdated=_outdated(path, table["parent"], parent) or _outdated(path, table["fork"], fork),
        )
    except (KeyError, TypeError, ValueError, OSError) as error:
        if isinstance(error, Mistake):
            raise
        wrong = f"{type(error).__name__}: {error}"
        raise Mistake(f"{path} is not what ablate writes ({wrong:.80}) → {WAY_OUT} {fork.name}") from None


def problems(fork: Member, family: Family) -> list[str]:
    """That a fork's results are out of date or damaged, as a sentence that says what to do; none if it has none, or if all is well."""
    if fork.experiment is None or fork.experiment.parent not in family.names:
        return []  # which `lineage.problems` reports
    parent = family.member(fork.experiment.parent)
    if parent.experiment is None:
        return []
    try:
        result = read(parent, fork)
    except Mistake as mistake:
        return [str(mistake)]
    if result is None or not result.outdated:
        return []
    where = short_path(fork.folder / RESULTS)
    return [f"{where} is of other settings ({result.outdated}) → python -m research ablate {fork.name}, or remove the folder"]


def _outdated(path: Path, then: dict[str, Any], member: Member) -> str:
    """What differs between the settings that were trained and those of the folder, among those that affect results."""
    assert member.experiment is not None
    if then["name"] != member.name:
        return f"its parent is {member.name}, and was {then['name']}"
    old, new = (flatten(serialization.resolved(one)) for one in (serialization.migrated(then["config"], path), member.experiment))
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name) and not belongs(name, PLUMBING)]
    changes = describe_changes([(name, old.get(name), new.get(name)) for name in names])
    is_code = bool({*variant_names(member.experiment)} - {MEASURE}) and then[VARIANTS] != _digest(member)
    code = f"{VARIANTS} has changed" if is_code else ""
    said = ", ".join(filter(None, [changes, code]))
    return f"{member.name}: {said}" if said else ""
