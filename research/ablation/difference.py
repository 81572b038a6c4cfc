"""What differs between two experiments, runs or checkpoints, in any mix: settings, variant.py, data, code and versions.

Of a run and a checkpoint nothing is executed: they may be somebody else's. Imports no torch.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from parallel.checkpoint.damage import read_manifest
from parallel.checkpoint.folder import MANIFEST, newest_complete
from parallel.errors import Mistake, nearest
from parallel.regular_files import read_regular
from research import ROOT
from research.ablation.lineage import EXPERIMENTS, differences
from research.cluster.environment import git_state
from research.cluster.software import digest_of, library_files, library_versions
from research.config import Experiment, serialization
from research.config.diff import PLUMBING, Change, belongs, diff
from research.config.experiment_folder import CONFIG, VARIANTS, load
from research.tracking import run_folder, run_record
from research.tracking.run_folder import RunFolder

RUN = "run.json"
LARGEST = 2**20
"""The most bytes of a variant.py that is read."""
LONGEST = 80
"""The most characters of what a run says of itself."""
DIGITS = 16
"""Hexadecimal digits of a SHA-256 that are shown."""
VERSIONS = ("torch", "deepspeed")
CHANGED = " (changed)"
"""Behind a commit whose tree had other changes."""


@dataclass(frozen=True)
class Side:
    """One of the two things that are compared."""

    label: str
    kind: str
    """'experiment', 'run' or 'checkpoint'."""
    experiment: Experiment
    variant: bytes | None
    """variant.py; None if there is none."""
    origin: Mapping[str, str]
    """'data', 'commit', 'code', 'torch', 'deepspeed', 'step' -> what is known of it."""


@dataclass(frozen=True)
class Difference:
    """What differs between two sides."""

    science: list[Change]
    """Settings that affect results, and variant.py if a setting names any of it."""
    plumbing: list[Change]
    variant: list[str]
    """variant.py as a unified diff; [] if it is the same."""
    origin: list[Change]
    """Data, code and versions that differ or are known of one side only; None for what is not known."""

    @property
    def affects_results(self) -> bool:
        """Whether settings, code of variant.py or the data differ."""
        return bool(self.science) or any(name == "data" and None not in values for name, *values in self.origin)


def find(handle: str, experiments: Path = EXPERIMENTS) -> Side:
    """The side that a person names: an experiment's folder, a run (folder, title, or name for its newest), or a checkpoint's folder.

    The name of an experiment that has runs means the newest of them, as for other verbs; without runs it means its folder.
    """
    path = Path(handle)
    if run_folder.has_file(path, MANIFEST):
        folder, checkpoint = run_folder.find_checkpoint(handle, needs="config.json")
        return _of_checkpoint(folder, checkpoint)
    if path.name == "source" and run_folder.has_file(path.parent, RUN):  # its config.py is not executed
        return _of_run(RunFolder(path.parent.resolve()))
    if run_folder.has_file(path, CONFIG) and not run_folder.has_file(path, RUN):
        return _of_experiment(path)
    try:
        return _of_run(run_folder.find(handle))
    except Mistake as mistake:
        if run_folder.has_file(experiments / handle, CONFIG):
            return _of_experiment(experiments / handle)
        near = nearest(path.name, sorted(found.parent.name for found in experiments.glob(f"*/{CONFIG}")))
        if near and not run_folder.has_file(path, RUN):
            raise Mistake(f"{handle:.100} is no experiment, run or checkpoint → did you mean {experiments.name}/{near}?") from None
        raise mistake


def compare(x: Side, y: Side) -> Difference:
    """What differs."""
    changes = [change for change in diff(x.experiment, y.experiment) if change[0] != "schema"]
    plumbing = [change for change in changes if belongs(change[0], PLUMBING)]
    science = differences(x.experiment, x.variant, y.experiment, y.variant)
    variant = unified_diff(x.variant, y.variant, x.label, y.label)
    known = [name for name in dict.fromkeys([*x.origin, *y.origin]) if x.origin.get(name) != y.origin.get(name)]
    return Difference(science, plumbing, variant, [(name, x.origin.get(name), y.origin.get(name)) for name in known])


def unified_diff(then: bytes | None, now: bytes | None, label: str, other: str) -> list[str]:
    """The lines of a unified diff of two variant.py, of which None has no line; [] if they are the same."""
    old, new = ((text or b"").decode("utf-8", "replace").splitlines() for text in (then, now))
    return list(difflib.unified_diff(old, new, f"{label}/{VARIANTS}", f"{other}/{VARIANTS}", lineterm=""))


def _of_experiment(folder: Path) -> Side:
    """A folder, which the code and the libraries of this checkout would train."""
    loaded = load(folder)
    commit, dirty = git_state(ROOT)
    origin = {"commit": commit + CHANGED * dirty, "code": digest_of(library_files(ROOT))[:DIGITS]}
    versions = {name: version for name, version in library_versions().items() if name in VERSIONS}
    return Side(loaded.name, "experiment", loaded.experiment, read_variant(loaded.folder), origin | versions)


def _of_run(folder: RunFolder) -> Side:
    """A run, with what its newest checkpoint says of the data and the versions."""
    experiment, run = serialization.load(folder.config), run_record.read(folder)
    checkpoint = newest_complete(folder.checkpoints)
    origin = {} if checkpoint is None else _origin(checkpoint)
    origin.pop("step", None)
    if run["commit"]:
        origin["commit"] = str(run["commit"])[:LONGEST] + CHANGED * bool(run["dirty"])
    return Side(folder.title, "run", experiment, read_variant(folder.source), origin)


def _of_checkpoint(folder: RunFolder, checkpoint: Path) -> Side:
    experiment = serialization.load(folder.config)
    return Side(f"{folder.title}/{checkpoint.name}", "checkpoint", experiment, read_variant(folder.source), _origin(checkpoint))


def _origin(checkpoint: Path) -> dict[str, str]:
    """What a checkpoint's manifest says of where it comes from."""
    facts = read_manifest(checkpoint).facts
    machine = facts.get("machine")
    named = {"step": facts.get("step"), "data": facts.get("data"), "commit": facts.get("commit"), "code": facts.get("code")}
    named |= {name: machine.get(name) for name in VERSIONS} if isinstance(machine, dict) else {}
    shown = {name: str(value)[: DIGITS if name in ("data", "code") else LONGEST] for name, value in named.items() if value is not None}
    return shown


def read_variant(folder: Path) -> bytes | None:
    """The variant.py of a folder, which is not executed; None if it has none."""
    path = folder / VARIANTS
    if not path.exists():
        return None
    try:
        return read_regular(path, LARGEST)
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror or error}) → restore it, or name another folder") from None
