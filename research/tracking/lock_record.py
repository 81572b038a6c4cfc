"""The files of a run's lock (research/tracking/run_lock.py): records of its holders, their heartbeats, and the flock.

`claim` is atomic among all hosts. Nothing here waits for longer than it is told to, and nothing of a stranger's folder is opened that is
not a regular file.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import operator
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from parallel.process_identity import ProcessIdentity

BEAT_SECONDS = 1.0
FLOCK_SECONDS = 1.0
"""How long a busy flock is tried again: others hold it for a moment to test it."""
RECORD_BYTES = 4096
RECORD = re.compile(r"(\d{6,12})\.json")
FLOCK = "flock"
HEARTBEATS = "rank_*.alive.json"
"""Matches the ranks' heartbeat files in a run's logs/."""
READINGS = 5
"""How often a record is read that is no JSON: it may just be written."""
TRAINING = "training"
"""The purpose of a process that trains the run. Others name the verb that writes into the run."""

Key = TypeVar("Key")
Content = TypeVar("Content")


@dataclass(frozen=True)
class Owner:
    """One record: who holds or held the lock."""

    number: int
    """Of the record; 0 for a run of an older version, which is known by its run.json only."""
    process: ProcessIdentity | None
    """None if the record cannot be read."""
    purpose: str = ""
    """What it does with the run: TRAINING, or the verb that writes into it."""
    since: str = ""
    token: str = ""
    released: bool = False
    end: Mapping[str, Any] = field(default_factory=dict)
    """status, reason and code of the run's end, if run.json could not be written; else empty."""

    def __str__(self) -> str:
        who = str(self.process) if self.process else "a process that is not known"
        return f"{who}, since {self.since or 'an unknown time'}"


def now() -> str:
    """The time in UTC, to the second: 2026-01-31T12:00:00+00:00."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def newest(place: Path) -> Owner | None:
    """The record with the highest number in the folder `place`; None if there is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        numbers = [int(match[1]) for name in os.listdir(place) if (match := RECORD.fullmatch(name))]
        return read_record(place, max(numbers)) if numbers else None
    return None


def path_of(place: Path, number: int) -> Path:
    """The file of the record with this number."""
    return place / f"{number:06d}.json"


def opened(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file; OSError for anything else: a run's folder may come from a stranger, and a pipe would block."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file", str(path))
    return descriptor


def content_of(path: Path) -> bytes:
    """The beginning of a file, at most as many bytes as a record has."""
    descriptor = opened(path)
    try:
        return os.read(descriptor, RECORD_BYTES)
    finally:
        os.close(descriptor)


def read_record(place: Path, number: int) -> Owner:
    """The record with this number; without a process if it cannot be read, as while it is made or written."""
    for _ in range(READINGS):
        with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
            values = json.loads(content_of(path_of(place, number)))
            end = values.get("end", {})
            said = {name: str(values.get(name, ""))[:200] for name in ("purpose", "since", "token")}
            process = ProcessIdentity.from_json(values)
            return Owner(number, process, **said, released=bool(values.get("released")), end=end if isinstance(end, dict) else {})
        time.sleep(0.01)
    return Owner(number, None)


def encoded(record: Mapping[str, Any]) -> bytes:
    """The record as JSON of always the same size, so that it can be overwritten in place. Too long a reason is cut."""
    text = json.dumps(record)
    if len(text) >= RECORD_BYTES:
        end = record.get("end", {})
        shorter = {**record, "end": {**end, "reason": str(end.get("reason", ""))[:300].encode("ascii", "replace").decode()}}
        text = json.dumps(shorter)
    return text.encode().ljust(RECORD_BYTES - 1)[: RECORD_BYTES - 1] + b"\n"


def claim(place: Path, number: int, token: str, content: bytes) -> bool:
    """Makes the record `number`; False if it is there already. Atomic among all hosts, over NFS too.

    A server that answers a repeated link(2) says that the file is there although the first one made it: the token tells whose it is.
    """
    temporary, target = place / f".{token}.tmp", path_of(place, number)
    try:
        temporary.write_bytes(content)
        os.link(temporary, target)
        return True
    except FileExistsError:
        return read_record(place, number).token == token
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        try:  # a file system without links
            with target.open("xb") as file:
                file.write(content)
            return True
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)


def try_flock(place: Path) -> int | None:
    """A descriptor of the lock file, locked if the file system has locks; None if another process holds it, or there is no file."""
    try:
        descriptor = opened(place / FLOCK, os.O_WRONLY | os.O_CREAT)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass
    return descriptor


def is_flocked(place: Path, seconds: float = FLOCK_SECONDS) -> bool:
    """Whether another process holds the flock for longer than a moment. False where there is no lock file or no flock."""
    ends = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        descriptor = opened(place / FLOCK)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return False
                except BlockingIOError:
                    if time.monotonic() >= ends:
                        return True
                    time.sleep(0.05)
        finally:
            os.close(descriptor)
    return False


def heartbeats_of(place: Path) -> dict[str, bytes]:
    """The heartbeats of a run, by file: the content of its lock's newest record, and that of the ranks' heartbeat files beside it."""
    heartbeats = {}
    owner = newest(place)
    paths = [*([path_of(place, owner.number)] if owner else []), *(place.parent / "logs").glob(HEARTBEATS)]
    for path in paths:
        with contextlib.suppress(OSError):
            heartbeats[path.name] = content_of(path)
    return heartbeats


def has_heartbeat(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> bool:
    """Whether a heartbeat lies between two results of `heartbeats_of`: a file has changed or is new. A removed file is no heartbeat."""
    return any(before.get(name) != content for name, content in after.items())


def beating(places: Sequence[Path], seconds: float, is_over: Callable[[], bool] = lambda: False) -> set[Path]:
    """Those of the locks whose holder, or one of its ranks, changes a heartbeat within `seconds`, on whatever host.

    It ends earlier when all have, or when `is_over` says so.
    """
    return changing(places, seconds, heartbeats_of, has_heartbeat, is_over)


def changing(
    keys: Iterable[Key],
    seconds: float,
    read: Callable[[Key], Content],
    has_changed: Callable[[Content, Content], bool] = operator.ne,
    is_over: Callable[[], bool] = lambda: False,
) -> set[Key]:
    """Those of `keys` for which `read` returns something else within `seconds`; it ends earlier when all have, or `is_over` says so."""
    before, changed = {key: read(key) for key in keys}, set[Key]()
    ends = time.monotonic() + seconds
    while len(changed) < len(before) and time.monotonic() < ends and not is_over():
        time.sleep(min(BEAT_SECONDS / 2, seconds))
        changed |= {key for key in before.keys() - changed if has_changed(before[key], read(key))}
    return changed
