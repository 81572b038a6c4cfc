"""Whether a run's process lives: its status for a person, and its lock for a process that is to change it.

run.json says `running` of a run that was killed, too. A process is then looked for, or its heartbeat is watched.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel.checkpoint.folder import newest_complete
from parallel.files import read_json
from parallel.process_identity import ProcessIdentity
from research.tracking import acquire_lock
from research.tracking.lock_record import TRAINING, Owner, beating
from research.tracking.run_folder import RUNNING, RunFolder, by_start, is_latest, of_experiment, read_run
from research.tracking.run_lock import RunLock

DIED = "died"
"""The status of a run whose run.json says `running`, but whose process has ended."""
STATUS_WATCH_SECONDS = 4.0
"""How long `status` watches the heartbeat of a run whose process cannot be seen. It changes every second."""


def earlier_owner(folder: RunFolder) -> Owner | None:
    """The process that run.json names, for a run that an older version has left running: it has no lock."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        run = read_json(folder.run)
        if run.get("status") != RUNNING or "host" not in run:
            return None
        process = ProcessIdentity.from_json(run)
        if process is None:  # still older: host and pid only
            process = ProcessIdentity(str(run["host"]), int(run.get("pid", 0)), "", "", 0.0)
        since = str(run.get("segments", [run])[-1].get("started"))
        return Owner(0, process, since=since)
    return None


def take_lock(folder: RunFolder, purpose: str = TRAINING, report: Callable[[str], object] = lambda line: None) -> RunLock:
    """Takes the run's lock for this process, until `release`. Held, a Mistake, names the process that holds it.

    `purpose`: TRAINING, or the verb that changes the run's files. `report` is told before a silent process is listened to.
    """
    earlier = earlier_owner(folder)
    if earlier and earlier.process and earlier.process.is_same(ProcessIdentity.current()):
        earlier = None
    return acquire_lock.take(folder.lock, folder.title, purpose, earlier, report)


def status(run: Mapping[str, Any], folder: RunFolder) -> str:
    """The status in `run`, which is run.json of `folder`; `died` for a `running` one whose process has ended.

    If a process cannot be seen from here (another machine or container), its heartbeat is watched for STATUS_WATCH_SECONDS.
    """
    return statuses([(run, folder)])[0]


def statuses(runs: Sequence[tuple[Mapping[str, Any], RunFolder]]) -> list[str]:
    """`status` of each run. The heartbeats of those whose processes cannot be seen are watched at the same time."""
    found, unseen = [str(run.get("status", "unknown")) for run, _ in runs], dict[int, Path]()
    for i, (_, folder) in enumerate(runs):
        if found[i] == RUNNING:
            held = acquire_lock.is_held(folder.lock, earlier_owner(folder))
            found[i] = RUNNING if held else DIED
            if held is None:
                unseen[i] = folder.lock
    alive = beating([*unseen.values()], STATUS_WATCH_SECONDS) if unseen else set[Path]()
    return [RUNNING if unseen.get(i) in alive else word for i, word in enumerate(found)]


def choice(handle: str, folder: RunFolder) -> str:
    """Which run `find` chose, for a person: 'gpt_sotu is gpt_sotu-7f3a2c, the newest run with a checkpoint'; '' if `handle` names it.

    Newer runs, which have no checkpoint, are named with their status.
    """
    path = Path(handle)
    named = folder.id in (path.resolve().name, handle.rpartition("-")[2]) or folder.path in path.resolve().parents
    if named and not is_latest(path):
        return ""
    if newest_complete(folder.checkpoints) is None:
        return f"{handle} is {folder.title}, the newest run; none has a checkpoint"
    runs = by_start(of_experiment(folder.path.parent))
    later = runs[runs.index(folder) + 1 :]
    newer = [f"{run.title} ({word})" for run, word in zip(later, _statuses_of(later), strict=True)]
    passed_over = f"; {', '.join(newer)} {'is' if len(newer) == 1 else 'are'} newer and {'has' if len(newer) == 1 else 'have'} none"
    return f"{handle} is {folder.title}, the newest run with a checkpoint{passed_over if newer else ''}"


def _statuses_of(folders: Sequence[RunFolder]) -> list[str]:
    """The status of each run; 'unreadable' for one whose run.json is damaged."""
    known: list[tuple[Mapping[str, Any], RunFolder]] = []
    for folder in folders:
        try:
            known.append((read_run(folder), folder))
        except (OSError, ValueError):
            known.append(({"status": "unreadable"}, folder))
    return statuses(known)
