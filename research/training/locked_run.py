"""A run's folder and its lock during one launch: what a full disk or a deleted folder does to the run, and how its end is recorded.

A run ends after the step in which its disk refuses a row, or its folder was deleted. The rank that
finds this asks all others to stop, as a signal would, so that a last checkpoint can be written where that is possible.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from parallel.errors import DiskRefuses, FolderLost
from parallel.files import FULL, read_json, write_json
from parallel.object_collectives import broadcast_object
from research.config import Experiment, serialization
from research.tracking import run_folder, run_status
from research.tracking.run_folder import RunFolder
from research.tracking.run_lock import LockView, RunLock, State
from research.training.job import Job


class LockedRun:
    """The folder of a run, and its lock as this rank knows it. Rank 0 has the lock; the others see its record."""

    def __init__(self, folder: RunFolder, view: LockView, experiment: Experiment) -> None:
        self.folder, self.view, self._experiment = folder, view, experiment
        self._lock = view if isinstance(view, RunLock) else None
        self._run: dict[str, Any] = read_json(folder.run) if self._lock else {}

    def check(self) -> None:
        """Ends the process if another one has taken the run over. Rank 0 calls it before it writes anything of the run."""
        if self._lock:
            self._lock.check()

    @property
    def was_deleted(self) -> bool:
        """Whether the folder, or its lock, was deleted under the run. Known on rank 0."""
        return self._lock is not None and self._lock.removed

    def restore(self) -> None:
        """Makes the folder again after it was deleted, so that a last checkpoint can be written into it. Rank 0 only."""
        if self._lock is None or self._lock.state() is not State.REMOVED:
            return
        if not self._lock.restore():
            self._lock.check()
            return
        for folder in (self.folder.checkpoints, self.folder.logs):
            folder.mkdir(exist_ok=True)
        if not self.folder.config.is_file():
            serialization.save(self._experiment, self.folder.config)
        if not self.folder.run.is_file():
            write_json(self.folder.run, self._run)

    def discard(self) -> None:
        """Gives the lock up and removes the folder of a run that was refused before its first step. Rank 0 only."""
        if self._lock:
            self._lock.release()
            run_folder.discard(self.folder)

    def end(self, status: str, reason: str, code: int) -> None:
        """Records how the run ended: in run.json, or in the lock's record if the disk is full. Rank 0 only."""
        if self._lock:
            with contextlib.suppress(OSError):
                self.restore()
            run_folder.end_or_keep(self.folder, self._lock, status, reason, code)


def take(job: Job, folder: RunFolder) -> RunLock:
    """The run's lock: the one that was taken when the run was found, or else a new folder's. Rank 0 only.

    The lock that kept other processes from beginning the same run is given up.
    """
    lock = next((lock for lock in job.locks if lock.place == folder.lock), None) or run_status.take_lock(folder)
    others = [other for other in job.locks if other is not lock]
    job.locks[:] = [lock]
    for other in others:
        other.release()
    return lock


def share(lock: RunLock | None, experiment: Experiment) -> LockedRun:
    """The run's folder and lock on this rank. Rank 0 brings the lock, whose record the others see. Collective."""
    said = json.dumps([str(lock.place.parent), lock.number, lock.token]) if lock else ""
    path, number, token = json.loads(broadcast_object(said))
    folder = RunFolder(Path(path))
    return LockedRun(folder, lock or LockView(folder.lock, number, token), experiment)


@contextlib.contextmanager
def disk_errors(folder: Path, has_begun: Callable[[], bool]) -> Iterator[None]:
    """Turns an OSError of a full disk, or of a folder that was deleted, into a Mistake with the exit code of its own.

    `has_begun`: whether there are steps of the run to go on from.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            then = "go on with --resume auto" if has_begun() else "launch again"
            why = f"{error.filename or folder} cannot be written ({error.strerror})"
            raise DiskRefuses(f"{why} → make room on its disk, then {then}") from error
        if not folder.is_dir():
            raise FolderLost(deleted(folder) if has_begun() else f"{folder} was deleted while the run began → launch again") from error
        raise


def deleted(folder: Path) -> str:
    """The sentence about a run whose folder is gone."""
    return (
        f"{folder} was deleted while the run went on: its earlier rows and checkpoints are lost → begin anew, or go on with --resume auto"
    )
