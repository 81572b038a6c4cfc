"""Resuming: the run and the checkpoint that `--resume` names, and whether today's settings allow it.

Everything here is decided before torch is imported.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.damage import damage_of, read_manifest
from parallel.errors import Damaged, Mistake
from research.config import Experiment, serialization
from research.config.diff import MOST, PLUMBING, Change, belongs, describe_changes, diff, flatten
from research.config.experiment_folder import VARIANTS, variant_names
from research.config.schema import MEASURE
from research.config.sources import TRAIN
from research.data.sources import same_until
from research.tracking import run_folder, run_status
from research.tracking.acquire_lock import Held, is_held, take
from research.tracking.format import short_path
from research.tracking.lock_record import newest as newest_record
from research.tracking.run_folder import FINISHED, IMPORTED, RUNNING, RunFolder
from research.tracking.run_lock import RunLock

AUTO, NEVER = "auto", "never"
MAY_CHANGE = (*PLUMBING, "schedule.steps", "precision", "deepspeed")
"""Settings, or groups of them, that may change on resume because the run stays the same experiment."""


@dataclass(frozen=True)
class Resume:
    """A run to resume, and the checkpoint to resume from."""

    folder: RunFolder
    checkpoint: Path
    facts: dict[str, Any]
    """What the checkpoint's manifest says of the run."""
    changed: list[Change]
    """The settings that differ from the saved ones, all of them in MAY_CHANGE but for later weights of data.train."""
    passed_over: dict[str, str] = field(default_factory=dict)
    """Newer checkpoints of the run that are damaged, and how; `auto` has fallen back to this one."""

    @property
    def step(self) -> int:
        """Optimizer steps taken before the checkpoint."""
        return self.facts["step"]


def find(handle: str, experiment: Experiment, source: Path, runs: Path, locks: list[RunLock] | None = None) -> tuple[Resume | None, str]:
    """(the run that `handle` names, why): handle is auto, never, a run or a checkpoint; None if a new run begins. Rank 0 only.

    `source` is the experiment's folder, `runs` the folder that holds NAME/ID/. Raises a Mistake if the run cannot be resumed, and Held
    if another process holds it. `locks` gets the lock of the run, or, where `auto` finds none, a lock that keeps other processes from
    beginning the same run until the new one has a folder. None: nothing is locked, as in a dry run, which changes nothing.
    """
    if handle == NEVER:
        return None, ""
    if handle == AUTO:
        return _find_newest(experiment, source, runs, locks)
    folder, checkpoint = run_folder.find_checkpoint(handle, runs)
    _refuse_other_experiment(folder, checkpoint, experiment, source)
    _lock(folder, locks)
    folder, checkpoint = run_folder.find_checkpoint(handle, runs)  # again: its last holder may have gone on in between
    _refuse_other_experiment(folder, checkpoint, experiment, source)
    if damage := damage_of(checkpoint):
        whole, _ = checkpoint_folder.newest_whole(checkpoint_folder.up_to_latest(folder.checkpoints))
        way_out = f"add --resume {short_path(whole)}, the newest whole one, or --resume auto" if whole else "no other one is whole"
        raise Damaged(f"{checkpoint} is damaged: {damage} → {way_out}")
    return _resume(folder, checkpoint, experiment), run_status.choice(handle, folder)


def _find_newest(experiment: Experiment, source: Path, runs: Path, locks: list[RunLock] | None) -> tuple[Resume | None, str]:
    """What `find` returns for auto: the newest unfinished run with these settings, from its newest whole checkpoint."""
    start = _lock_start(experiment, source, runs) if locks is not None else None
    try:
        while True:
            folder, why = _newest_match(experiment, source, runs, locks is not None)
            if folder is None:
                if start is not None and locks is not None:
                    locks.append(start)
                    start = None
                return None, why
            lock = _lock(folder, locks)
            if run_folder.read_run(folder).get("status") != FINISHED and checkpoint_folder.newest_complete(folder.checkpoints):
                break
            if lock is None or locks is None:
                raise Mistake(f"{folder.title} has just ended → try again")
            locks.remove(lock)  # its last holder has finished it in between
            lock.release()
    finally:
        if start is not None:
            start.release()

    checkpoint, damaged = checkpoint_folder.newest_whole(checkpoint_folder.up_to_latest(folder.checkpoints))
    if checkpoint is None:
        wrong = "; ".join(damaged.values())
        raise Damaged(f"{folder.title} has no whole checkpoint: {wrong} → leave --resume out to begin a run of its own")
    return _resume(folder, checkpoint, experiment, {path.name: damage for path, damage in damaged.items()}), why


def _lock(folder: RunFolder, locks: list[RunLock] | None) -> RunLock | None:
    """Takes the run's lock into `locks`. Without `locks`, refuses a run whose holder can be seen to live."""
    if locks is not None:
        locks.append(run_status.take_lock(folder, report=_report))
        return locks[-1]
    owner = newest_record(folder.lock) or run_status.earlier_owner(folder)
    held = is_held(folder.lock, owner)
    if held and owner is not None:
        raise Held(folder.title, owner, "")
    if held is None:
        _report(f"{folder.title} may be in use by {owner}: a dry run does not watch its heartbeat")
    return None


def _lock_start(experiment: Experiment, source: Path, runs: Path) -> RunLock:
    """The lock of those who look for an unfinished run with these settings, and begin one if there is none."""
    settings = {name: value for name, value in flatten(serialization.resolved(experiment)).items() if not belongs(name, MAY_CHANGE)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
    place = runs / source.name / f".starting-{digest}"
    return take(place, f"a run of {source.name} with these settings", run_folder.STARTING, report=_report, temporary=True)


def _report(line: str) -> None:
    sys.stderr.write(f"resume   {line}\n")


def _refuse_other_experiment(folder: RunFolder, checkpoint: Path, experiment: Experiment, source: Path) -> None:
    """Raises a Mistake if the run is not one of this experiment, or has nothing left to do."""
    if folder.name != source.name:
        raise Mistake(
            f"{folder.title} is a run of {folder.name}, this is {source.name} → launch experiments/{folder.name} to go on with it"
        )
    status = run_folder.read_run(folder).get("status")
    if status == IMPORTED:
        raise Mistake(f"{folder.title} was imported, not trained: it holds weights alone → leave --resume out: init_from begins with them")
    steps = experiment.schedule.steps
    if status == FINISHED and steps <= _facts(checkpoint)["step"]:
        raise Mistake(
            f"{folder.title} has taken all of its {steps} steps → add --schedule.steps {2 * steps} to go on, or leave --resume out"
        )
    then, now = _variant_digests(folder, source, experiment)
    if then != now:  # a changed class is another model or training, which no setting shows
        raise Mistake(
            f"{source / VARIANTS} is not what {folder.title} was trained with (SHA-256 {then[:12]} → {now[:12]}) → "
            f"put {folder.source / VARIANTS} back, or begin a run of its own"
        )
    if refused := _refused_changes(serialization.load(folder.config), experiment, checkpoint):
        raise Mistake(
            f"{folder.title} cannot go on with {_first(refused)}: its steps so far were taken with the old value → "
            "put it back, or begin a run of its own (without --resume), in a copy of the experiment's folder"
        )


def science(changes: list[Change]) -> list[Change]:
    """The changes that make it another experiment: those not in MAY_CHANGE."""
    return [change for change in changes if not belongs(change[0], MAY_CHANGE)]


def _refused_changes(then: Experiment, now: Experiment, checkpoint: Path) -> list[Change]:
    """The changes that make it another experiment. Other weights of sources, or more sources, do not if they begin after the checkpoint."""
    changes = science(diff(then, now))
    if not any(name == TRAIN for name, _, _ in changes) or not same_until(then.data.train, now.data.train, _facts(checkpoint)["step"]):
        return changes
    return [change for change in changes if change[0] != TRAIN]


def _first(changes: list[Change]) -> str:
    """The first MOST changes, and how many more there are."""
    return describe_changes(changes[:MOST]) + (f" and {len(changes) - MOST} more" if len(changes) > MOST else "")


def _resume(folder: RunFolder, checkpoint: Path, experiment: Experiment, passed_over: Mapping[str, str] = MappingProxyType({})) -> Resume:
    changed = [change for change in diff(serialization.load(folder.config), experiment) if change[0] != "schema"]
    return Resume(folder, checkpoint, _facts(checkpoint), changed, dict(passed_over))


def _newest_match(experiment: Experiment, source: Path, runs: Path, watch: bool) -> tuple[RunFolder | None, str]:
    """The newest unfinished run whose science and seed are `experiment`'s, and why it, or why there is none.

    It has a checkpoint, or it is running and may save its first one soon. `watch`: watch the heartbeat of one that cannot be seen.
    """
    unfinished: dict[RunFolder, list[Change]] = {}  # run -> its differences
    damaged: list[str] = []
    finished: RunFolder | None = None
    for folder in run_folder.by_start(run_folder.of_experiment(runs / source.name)):
        try:
            status = run_folder.read_run(folder).get("status")
            has_checkpoint = checkpoint_folder.newest_complete(folder.checkpoints) is not None
            if not has_checkpoint and status != RUNNING:
                continue
            changes = science_changes(folder, source, experiment)
            if not has_checkpoint and (changes or not _is_alive(folder, watch)):
                continue
        except (OSError, ValueError):  # this does not keep another run from being resumed
            damaged.append(folder.title)
            continue
        if status == FINISHED:
            finished = finished if changes else folder
        elif status != IMPORTED:
            unfinished[folder] = changes

    matching = [folder for folder, changes in unfinished.items() if not changes]
    if len(matching) > 1:
        others = ", ".join(folder.title for folder in matching[:-1])
        return matching[-1], f"{matching[-1].title} is the newest unfinished run with these settings; older: {others}"
    if matching:
        return matching[0], ""

    # none: what is nearest
    unread = f"; {', '.join(damaged)} cannot be read" if damaged else ""
    if finished:
        return None, f"a new run: {finished.title}, which has these settings, is finished{unread}"
    if not unfinished:
        return None, f"a new run: {source.name} has no unfinished run with a checkpoint{unread}"
    nearest = min(reversed(unfinished), key=lambda folder: len(unfinished[folder]))
    why = f"no unfinished run has these settings; {nearest.title} is nearest, with {_first(unfinished[nearest])}"
    return None, f"a new run: {why}{unread}"


def _is_alive(folder: RunFolder, watch: bool) -> bool:
    """Whether the holder of a run lives. Its heartbeat is watched if it cannot be seen; if it is dead, its lock then says so for good."""
    held = is_held(folder.lock, run_status.earlier_owner(folder))
    if held is None and watch:
        try:
            run_status.take_lock(folder, report=_report).release()
        except Held:
            return True
    return bool(held)


def science_changes(folder: RunFolder, source: Path, experiment: Experiment) -> list[Change]:
    """What makes the run another experiment than `experiment` of the folder `source`."""
    changes = science(diff(serialization.load(folder.config), experiment))
    then, now = _variant_digests(folder, source, experiment)
    return changes if then == now else [*changes, (VARIANTS, then[:12], now[:12])]


def _facts(checkpoint: Path) -> dict[str, Any]:
    """What the manifest says without its tables. The file may come from a stranger."""
    return read_manifest(checkpoint).facts


def _variant_digests(folder: RunFolder, source: Path, experiment: Experiment) -> tuple[str, str]:
    """The SHA-256 of variant.py then and now; equal if nothing of it changes the model or its training (a measurement does not)."""
    if not variant_names(experiment).keys() - {MEASURE}:
        return "", ""

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"

    return digest(folder.source / VARIANTS), digest(source / VARIANTS)
