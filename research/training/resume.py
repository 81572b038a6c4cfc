"""Resuming: the run and the checkpoint that `--resume` names, or `init_from`, and whether today's settings allow it.

Everything here is decided before torch is imported.
"""

import hashlib
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.folder import MANIFEST
from parallel.checkpoint.manifest import MAX_BYTES, parse
from parallel.errors import Mistake
from parallel.files import read_json
from research.config import Experiment, serialization
from research.config.diff import MOST, Change, describe_changes, diff
from research.config.experiment_folder import VARIANTS, variant_names
from research.config.schema import MEASURE
from research.tracking import run_folder
from research.tracking.run_folder import FINISHED, IMPORTED, RUNNING, RunFolder

AUTO, NEVER = "auto", "never"
MAY_CHANGE = (
    "schema",
    "question",
    "parent",
    "schedule.steps",
    "schedule.micro_batch_size",
    "schedule.validate_every",
    "schedule.log_every",
    "data.cache",
    "parallel",
    "precision",
    "checkpoints",
    "watch",
    "evaluate",
    "sample",
    "track",
    "deepspeed",
)
"""Settings, or groups of them, that may change on resume because the run stays the same experiment."""


def allowed(then: Experiment, now: Experiment, run: str) -> list[Change]:
    """The changes between two sets of settings. Raises a Mistake that lists those that are not in MAY_CHANGE."""
    changes = diff(then, now)
    refused = [change for change in changes if not any(change[0] == prefix or change[0].startswith(f"{prefix}.") for prefix in MAY_CHANGE)]
    if refused:
        more = f" and {len(refused) - MOST} more" if len(refused) > MOST else ""
        raise Mistake(
            f"{run} cannot go on with {describe_changes(refused[:MOST])}{more}: its steps so far were taken with the old value → "
            "put it back, or begin a run of its own (without --resume), in a copy of the experiment's folder"
        )
    return [change for change in changes if change[0] != "schema"]


def init_from_path(experiment: Experiment, root: Path) -> Path | None:
    """The folder of the checkpoint that `init_from` names, relative to `root`; None if weights are drawn."""
    return None if experiment.init_from is None else Path(root) / Path(experiment.init_from).expanduser()


def check_init_from(experiment: Experiment, root: Path) -> None:
    """Raises a Mistake if `init_from` is set and names no checkpoint."""
    path = init_from_path(experiment, root)
    if path is None or (path / MANIFEST).is_file():
        return
    newest = checkpoint_folder.newest_complete(path / "checkpoints") if (path / "checkpoints").is_dir() else None
    such = f"{experiment.init_from}/checkpoints/{newest.name}" if newest else "runs/NAME/ID/checkpoints/step_N"
    raise Mistake(f"init_from = {experiment.init_from!r}: {path} is not a checkpoint, it has no {MANIFEST} → name {such}")


def init_from_digest(experiment: Experiment, root: Path) -> str:
    """A digest of the manifest, which holds the digest of every file; 'drawn' without init_from, 'missing' if it is not on this host."""
    path = init_from_path(experiment, root)
    if path is None:
        return "drawn"
    return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()[:16] if (path / MANIFEST).is_file() else "missing"


@dataclass(frozen=True)
class Resume:
    """A run to resume, and the checkpoint to resume from."""

    folder: RunFolder
    checkpoint: Path
    facts: dict[str, Any]
    """What the checkpoint's manifest says of the run."""
    changed: list[Change]
    """The settings that differ from the saved ones, all of them in MAY_CHANGE."""

    @property
    def step(self) -> int:
        """Optimizer steps taken before the checkpoint."""
        return self.facts["step"]


def find(handle: str, experiment: Experiment, source: Path, runs: Path) -> Resume | None:
    """The run that `handle` (auto, never, a run, a checkpoint) names; None if a new run begins. Rank 0 only.

    `source` is the experiment's folder, `runs` the folder that holds NAME/ID/. Raises a Mistake if the run cannot be resumed.
    """
    if handle == NEVER:
        return None
    folder, checkpoint = _newest(runs, source.name) if handle == AUTO else run_folder.find_checkpoint(handle, runs)
    if folder is None or checkpoint is None:
        return None
    if folder.name != source.name:
        raise Mistake(
            f"{folder.title} is a run of {folder.name}, this is {source.name} → launch experiments/{folder.name} to go on with it"
        )
    run = read_json(folder.run)
    status = run_folder.status(run)
    if status == RUNNING and run.get("host") == socket.gethostname():
        raise Mistake(f"{folder.title} is running (process {run['pid']}) → wait for its end, or end it: kill -USR1 {run['pid']}")
    if status == IMPORTED:
        raise Mistake(f"{folder.title} was imported, not trained: it holds weights alone → leave --resume out: init_from begins with them")
    steps = experiment.schedule.steps
    if handle != AUTO and status == FINISHED and steps <= _facts(checkpoint)["step"]:
        raise Mistake(
            f"{folder.title} has taken all of its {steps} steps → add --schedule.steps {2 * steps} to go on, or leave --resume out"
        )
    _refuse_other_variant(folder, source, experiment)
    return Resume(folder, checkpoint, _facts(checkpoint), allowed(serialization.load(folder.config), experiment, folder.title))


def _newest(runs: Path, name: str) -> tuple[RunFolder | None, Path | None]:
    """The newest run of the experiment that has a checkpoint, and its newest checkpoint; (None, None) if that run is finished."""
    candidates = [(read_json(folder.run), folder) for folder in run_folder.every(runs) if folder.name == name]
    for run, folder in sorted(candidates, key=lambda pair: str(pair[0].get("started")), reverse=True):
        if checkpoint_folder.newest_complete(folder.checkpoints) is None or run_folder.status(run) == IMPORTED:
            continue
        if run_folder.status(run) == FINISHED:
            return None, None
        return folder, checkpoint_folder.latest(folder.checkpoints)
    return None, None


def _facts(checkpoint: Path) -> dict[str, Any]:
    """What the manifest says without its tables. The file may come from a stranger."""
    path = checkpoint / MANIFEST
    try:
        with path.open("rb") as file:
            return parse(file.read(MAX_BYTES)).facts
    except (OSError, ValueError) as error:
        raise Mistake(f"{path} is not the manifest of a checkpoint: {error} → use another checkpoint of the run") from None


def _refuse_other_variant(folder: RunFolder, source: Path, experiment: Experiment) -> None:
    """Raises a Mistake if variant.py has changed: a changed class is another model or training, which no setting shows."""
    if not variant_names(experiment).keys() - {MEASURE}:  # a measurement changes nothing
        return
    paths = folder.source / VARIANTS, source / VARIANTS
    then, now = (hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing" for path in paths)
    if then != now:
        raise Mistake(
            f"{source / VARIANTS} is not what {folder.title} was trained with (SHA-256 {then[:12]} → {now[:12]}) → "
            f"put {folder.source / VARIANTS} back, or begin a run of its own"
        )
