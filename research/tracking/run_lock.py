"""The lock of a run: of all processes on all hosts that see the run's folder, one at a time may change it.

```
RUN/lock/000007.json   the seventh holder: its host and process, since when, and a count that it raises every second (its heartbeat)
RUN/lock/flock         while the holder lives it holds this file with flock(2), if the file system has that
```
The holder is the process in the record with the highest number. A record is made by link(2), which only one of several processes on
several hosts can do, so a number has one holder for ever. A holder marks its record as released when it ends.

`take` passes over a holder that has released the run, or whose process can be seen to have ended. One whose process cannot be seen, on
another host or in another container, is listened to: it has ended if neither it nor any rank changes its heartbeat for LISTEN_SECONDS,
and if flock does not say that it lives. A lock that flock grants proves nothing: over a network it may reach no further than this host.
Neither clocks of two hosts nor modification times are compared.

A holder that was stopped or cut off for so long can wake up after another process has taken the run over. It must call `check` before it
writes: `check` ends the process if the record is no longer its own. Records are opened anew each time, because a network file system
promises fresh content only to a file that is opened (close-to-open consistency), and they are overwritten in place, because that needs no
room on a full disk: so a record can also keep why the run has ended when run.json cannot be written.
"""

import contextlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from parallel.errors import FolderLost, Mistake
from parallel.process_identity import ProcessIdentity
from research.tracking.lock_record import (
    BEAT_SECONDS,
    FLOCK_SECONDS,
    RECORD,
    TRAINING,
    Owner,
    beating,
    claim,
    content_of,
    encoded,
    is_flocked,
    newest,
    now,
    opened,
    path_of,
    read_record,
    try_flock,
)

LISTEN_SECONDS = 30.0
"""How long a holder that cannot be seen is listened to. It beats every second; imports can hold its threads up for several."""
SETTLE_SECONDS = 3.0
"""How long a process that took the lock from a silent holder waits before it changes anything: the other one may just wake up."""
ROUNDS = 20
"""How often a contender begins again because another one was faster and has ended already."""
KEPT_RECORDS = 8
STDERR = 2


class State(Enum):
    """What a look at the lock's record says."""

    OURS = "ours"
    TAKEN = "taken over by another process"
    REMOVED = "removed, alone or with the whole folder"
    UNKNOWN = "unreadable at the moment"


class LockView:
    """The lock as a process sees it that knows its record: the holder itself, and the other ranks of its launch."""

    def __init__(self, place: Path, number: int, token: str) -> None:
        self.place, self.number, self.token = place, number, token
        self.path = path_of(place, number)

    def state(self) -> State:
        """Reads the record, and looks for one with a higher number."""
        try:
            values = json.loads(content_of(self.path))
            ours = values.get("token") == self.token
        except (FileNotFoundError, NotADirectoryError):
            return State.TAKEN if newest(self.place) else State.REMOVED
        except (ValueError, RecursionError, AttributeError):  # half of it was read while it was written
            return State.UNKNOWN
        except OSError:
            return State.UNKNOWN
        latest = newest(self.place)
        return State.OURS if ours and (latest is None or latest.number <= self.number) else State.TAKEN

    def why_lost(self, title: str) -> str:
        """The sentence of a process that has lost the lock."""
        return (
            f"{title} was taken over by {newest(self.place) or 'another process'}: this process, {ProcessIdentity.current()}, had given "
            "no heartbeat for so long that it counted as ended; it stops and writes nothing more → let the other one go on"
        )


class RunLock(LockView):
    """The lock in the hands of its holder. A thread writes the heartbeat from the moment it is taken until `release`."""

    def __init__(
        self,
        place: Path,
        number: int,
        token: str,
        title: str,
        record: dict[str, Any],
        temporary: bool = False,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        """Made by `take`. `leave` ends the process if the lock is lost."""
        super().__init__(place, number, token)
        self._temporary = temporary
        self.removed = False
        """Whether the lock's record was removed under its holder, as by `rm -r` of the run's folder."""
        self._title, self._record, self._leave, self._beat = title, record, leave, 0
        self._flock: int | None = None
        self._closed, self._writing, self._losing, self._lost = threading.Event(), threading.Lock(), threading.Lock(), False
        self._thread = threading.Thread(target=self._beat_until_closed, name="run lock", daemon=True)

    def check(self) -> None:
        """Ends this process with a sentence if another one has taken the lock over. Call it before anything of the run is written."""
        if self.state() is State.TAKEN:
            self._lose()

    def release(self) -> None:
        """Gives the lock up; the folder of a temporary one is removed, with the folders above it that are empty then.

        A second call does nothing.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(5 * BEAT_SECONDS)
        with contextlib.suppress(OSError):
            if self._temporary and self.state() is State.OURS:  # renamed while it is ours: whoever claims now, claims in a new folder
                gone = self.place.with_name(f".{self.place.name.lstrip('.')}.{self.token}")
                self.place.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
                for folder in (self.place.parent, self.place.parent.parent):
                    folder.rmdir()
            else:
                self._write(released=True)
        self._drop_flock()

    def close(self) -> None:
        """`release`, for contextlib.closing."""
        self.release()

    def keep_end(self, end: Mapping[str, Any]) -> bool:
        """Writes how the run ended into the record, for readers of a run.json that could not be written. False: not even that."""
        self._record["end"] = dict(end)
        with contextlib.suppress(OSError):
            return self._write()
        return False

    def restore(self) -> bool:
        """Makes the record again after it was removed, and the folders above it. False: another process has taken the place."""
        with contextlib.suppress(OSError):
            self.place.mkdir(parents=True, exist_ok=True)
            self._drop_flock()
            self._flock = try_flock(self.place)
            return claim(self.place, self.number, self.token, self._encoded()) and self.state() is State.OURS
        return False

    def _begin(self) -> None:
        """The claim is won: holds the flock, if there is one, and begins to beat."""
        self._thread.start()
        ends = time.monotonic() + FLOCK_SECONDS
        while (flock := try_flock(self.place)) is None and time.monotonic() < ends:
            time.sleep(0.05)
        self._flock = flock

    def _beat_until_closed(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            state = self.state()
            if self._closed.is_set():
                return
            if state is State.TAKEN:
                self._lose()
            elif state is State.REMOVED and not self.removed:
                gone = "folder was deleted" if not self.place.parent.is_dir() else f"lock, {self.place}, was deleted"
                purpose = self._record["purpose"]
                then = ": it ends after this step, with a last checkpoint" if purpose == TRAINING else f", which `{purpose}` is at work on"
                with contextlib.suppress(OSError):
                    os.write(STDERR, f"error  the {gone} under {self._title}{then}\n".encode())
                self.removed = True
            elif state is State.OURS:
                with contextlib.suppress(OSError):  # the file system fails for a moment, or for good: a contender listens for long
                    self._write()

    def _write(self, **changes: Any) -> bool:
        """Overwrites the record in place, if it is still there and ours. False: it is not."""
        with self._writing:
            if self.state() is not State.OURS:
                return False
            self._beat += 1
            self._record.update(changes)
            descriptor = opened(self.path, os.O_WRONLY)
            try:
                os.pwrite(descriptor, self._encoded(), 0)
            finally:
                os.close(descriptor)
            return True

    def _encoded(self) -> bytes:
        return encoded(self._record | {"beat": self._beat})

    def _lose(self) -> NoReturn:
        """Another process writes the run now, so this one must not, not even run.json: it ends without any clean-up."""
        with self._losing, contextlib.suppress(OSError, ValueError):  # the main thread and the heartbeat's may find it at once
            if not self._lost:
                os.write(STDERR, f"error  {self.why_lost(self._title)}\n".encode())
            self._lost = True
        self._leave(FolderLost.code)
        raise SystemExit(FolderLost.code)  # for a `leave` that returns

    def _drop_flock(self) -> None:
        if self._flock is not None:
            os.close(self._flock)
            self._flock = None


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
    """Raises a Mistake if the lock's owner lives. Returns whether the owner was out of sight, and silent while it was listened to."""
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
        report(f"{title} may be in use by {owner}: its heartbeat is watched for {LISTEN_SECONDS:.0f} s …")
        how_known = "its heartbeat goes on" if beating([place], LISTEN_SECONDS, has_changed) else ""
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
    """Whether the lock's owner lives, as far as can be said without waiting; None: it must be listened to (`beating`)."""
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
