"""The lock of a run: of all processes on all hosts that see the run's folder, one at a time may change it.

```
RUN/lock/000007.json   the seventh holder: its host and process, since when, and a count that it raises every second (its heartbeat)
RUN/lock/flock         while the holder lives it holds this file with flock(2), if the file system has that
```
The holder is the process in the record with the highest number. A record is made by link(2), which only one of several processes on
several hosts can do, so a number has one holder for ever. A holder marks its record as released when it ends.

`take` passes over a holder that has released the run, or whose process can be seen to have ended. One whose process cannot be seen, on
another host or in another container, is watched: it has ended if neither it nor any rank changes its heartbeat for WATCH_SECONDS,
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
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from parallel.errors import FolderLost
from parallel.process_identity import ProcessIdentity
from research.tracking.lock_record import (
    BEAT_SECONDS,
    FLOCK_SECONDS,
    TRAINING,
    claim,
    content_of,
    encoded,
    newest,
    opened,
    path_of,
    try_flock,
)

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
                with contextlib.suppress(OSError):  # the file system fails for a moment, or for good: a contender watches for long
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
