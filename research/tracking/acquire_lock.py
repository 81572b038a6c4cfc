"""Takes the lock of a run, or says who holds it; and tells whether anybody does. The lock itself is in research/tracking/run_lock.py."""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from parallel.process_identity import ProcessIdentity
from research.tracking.lock_record import (
    RECORD,
    TRAINING,
    Owner,
    beating,
    claim,
    encoded,
    is_flocked,
    newest,
    now,
    path_of,
    read_record,
    try_flock,
)
from research.tracking.run_lock import RunLock, State

WATCH_SECONDS = 30.0
"""How long the heartbeat of a holder that cannot be seen is watched. It changes every second, or, during imports, every few seconds."""
SETTLE_SECONDS = 3.0
"""How long a process that took the lock from a silent holder waits before it changes anything: the other one may just wake up."""
ROUNDS = 20
"""How often a contender begins again because another one was faster and has ended already."""
KEPT_RECORDS = 8


def take(
    place: Path,
    title: str,
    purpose: str = TRAINING,
    earlier: Owner | None = None,
    report: Callable[[str], object] = lambda line: None,
    temporary: bool = False,
    leave: Callable[[int], Any] = os._exit,
) -> RunLock:
    """Takes the lock in the folder `place`. Held, a Mistake, names the holder if there is one.

    `earlier`: who holds it if there is no record, for runs of older versions. `report` is told before a long wait. `temporary`: the
    folder, and those above it that are missing, are made, and are removed by `release`.
    """
    for _ in range(ROUNDS):
        owner = newest(place) or earlier
        unseen = refuse_held(place, title, owner, report)
        place.mkdir(parents=temporary, exist_ok=True)
        token, number = uuid.uuid4().hex, owner.number + 1 if owner else 1
        record = {"token": token, "purpose": purpose, "since": now(), "released": False, **asdict(ProcessIdentity.current())}
        lock = RunLock(place, number, token, title, record, temporary, leave)
        if _is_replaced(place, owner):
            continue
        try:
            if not claim(place, number, token, lock._encoded()):
                continue  # another contender was faster: who it is, the next round says
        except FileNotFoundError:  # the folder was removed with its last holder's record
            continue
        if lock.state() is not State.OURS:  # several others have come and gone since the newest record was read
            continue
        if _is_replaced(place, owner):  # in the moment since it was asked before
            with contextlib.suppress(OSError):
                lock.path.unlink()
            continue
        lock._begin()
        if owner is not None and owner.number:
            _mark_taken(place, owner.number, lock)
        if unseen:
            time.sleep(SETTLE_SECONDS)
            lock.check()
        return lock
    raise Mistake(f"{title}: {ROUNDS} other processes have taken its lock, one after the other → start fewer at once")


def release(locks: list[RunLock]) -> None:
    """Gives up the locks and empties the list."""
    while locks:
        locks.pop().release()


def refuse_held(place: Path, title: str, owner: Owner | None, report: Callable[[str], object] = lambda line: None) -> bool:
    """Raises a Mistake if the lock's owner lives. Returns whether the owner cannot be seen and its heartbeat did not change."""
    if owner is None or owner.released:
        return False
    seen = owner.process.is_alive() if owner.process else None
    if seen:
        raise Held(title, owner, "")
    if seen is False:
        return False

    def has_changed() -> bool:
        """Whether the holder has released it, or another one has it by now."""
        latest = newest(place)
        was, found = (owner.number, owner.token), (latest.number, latest.token) if latest else None
        return owner.number > 0 and (found != was or latest is None or latest.released)

    how_known = "it holds the lock" if is_flocked(place) else ""
    if not how_known and not has_changed():
        report(f"{title} may be in use by {owner}: its heartbeat is watched for {WATCH_SECONDS:.0f} s …")
        how_known = "its heartbeat goes on" if beating([place], WATCH_SECONDS, has_changed) else ""
    if has_changed():
        return refuse_held(place, title, newest(place), report)
    if how_known:
        raise Held(title, owner, f"it cannot be seen from here, but {how_known}")
    return True


class Held(Mistake):
    """Another process holds the lock. The sentence names its host, its process, and since when it holds it."""

    def __init__(self, title: str, owner: Owner, how_known: str) -> None:
        does = "is running" if owner.purpose in (TRAINING, "") else f"is in use by `{owner.purpose}`"
        where, pid = " there" if how_known else "", owner.process.pid if owner.process else "PID"
        why = f": {how_known}" if how_known else ""
        super().__init__(f"{title} {does} ({owner}){why} → wait for its end, or end it{where}: kill -USR1 {pid}")
        self.owner = owner


def is_held(place: Path, earlier: Owner | None = None) -> bool | None:
    """Whether the lock's owner lives, as far as can be said without waiting; None: its heartbeat must be watched (`beating`)."""
    owner = newest(place) or earlier
    if owner is None or owner.released:
        return False
    seen = owner.process.is_alive() if owner.process else None
    return True if seen is None and is_flocked(place, 0.0) else seen


@contextlib.contextmanager
def kept_from_others(place: Path, holder: ProcessIdentity) -> Iterator[bool]:
    """Yields whether `holder` is still the lock's last holder, for the ranks that outlive rank 0 and write why.

    They hold the flock for that moment, if rank 0 does not hold it any more: a process that cannot see that rank 0 has ended then takes
    it for alive. One that can see it does not look at the flock, and may take the lock over between this look and what is written.
    """
    flock = try_flock(place) if place.is_dir() else None
    try:
        owner = newest(place)
        yield owner is None or (owner.process is not None and owner.process.is_same(holder))
    finally:
        if flock is not None:
            os.close(flock)


def _is_replaced(place: Path, owner: Owner | None) -> bool:
    """Whether the record that was read is another one by now: a temporary lock's folder goes with its holder, and the next counts anew."""
    return owner is not None and owner.number > 0 and read_record(place, owner.number).token != owner.token


def _mark_taken(place: Path, number: int, lock: RunLock) -> None:
    """Replaces the last holder's record, so that it sees at once that it is not the holder any more; old records are removed.

    The record's number stays in use: no contender that has slept since it read it can claim the next one again.
    """
    with contextlib.suppress(OSError):
        last = read_record(place, number)
        marked = place / f".{lock.token}.taken"
        process = asdict(last.process) if last.process else {}
        marked.write_bytes(
            encoded({**process, "since": last.since, "purpose": last.purpose, "released": True, "token": "", "end": dict(last.end)})
        )
        marked.replace(path_of(place, number))
        for path in place.iterdir():
            if (match := RECORD.fullmatch(path.name)) and int(match[1]) < lock.number - KEPT_RECORDS:
                path.unlink()
