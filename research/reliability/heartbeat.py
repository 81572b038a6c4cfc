"""Writes and reads heartbeats: one small file per rank in logs/ that says what the rank is doing. The others watch whether it changes.

`Progress` is what a rank's main thread is doing: at which stage, in which step, and whether anything moves. `Heartbeat` is that and the
main thread's stack at one moment, as a file; `Heartbeats` writes this rank's file and reads those of the others.

The clocks of two machines are never compared, and no file's modification time is read: a rank is silent if its file's content has not
changed while the reader was watching. So neither a wrong clock nor a network file system makes a rank look dead.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

from research.tracking.lock_record import HEARTBEATS
from research.tracking.run_folder import RunFolder

STACK_DEPTH = 40
"""How many frames of a stack are kept, the innermost."""
WAITING = ("torch/distributed/", "deepspeed/comm/", "deepspeed/runtime/pipe/p2p.py")
"""A stack with one of these files in it waits for other ranks (or sends to them)."""
FAULT, SIGNAL, OTHERS, HANG = LEFT = ("fault", "signal", "others", "hang")
"""Why a rank leaves before the end: it raised, it was asked to, another rank had left, or nothing moved."""


class Stage(Enum):
    """What a signal interrupts: start-up with nothing to save yet; steps and validations, which end soon; saving; closing down."""

    START = "start-up"
    TRAINING = "training"
    SAVING = "saving"
    LEAVING = "leaving"


class Progress:
    """What the main thread is doing. It sets one attribute at a time; other threads read them."""

    def __init__(self) -> None:
        self.stage = Stage.START
        self.doing = "starting"
        self.step = 0
        self.moves = 0
        """Grows whenever something is done. Nothing else counts as progress."""
        self.busy = 0
        """> 0 inside work of unknown length, where lack of progress is not a hang."""
        self.step_seconds = 0.0
        """How long the last step took."""
        self.has_stepped = False
        """Whether the first step of this process is done."""
        self._step_began = 0.0

    def advance(self, doing: str, stage: Stage | None = None) -> None:
        """One thing is done and `doing` begins; `stage` if that changes."""
        self.has_stepped = self.has_stepped or self.doing == "step"
        self.doing, self.stage, self._step_began = doing, stage or self.stage, 0.0
        self.moves += 1

    def stepping(self, step: int) -> None:
        """Step number `step` begins, the one before it is done."""
        now = time.monotonic()
        self.step_seconds = now - self._step_began if self._step_began else self.step_seconds
        self.advance("step", Stage.TRAINING)
        self.step, self._step_began = step, now

    @contextlib.contextmanager
    def work(self, doing: str, stage: Stage | None = None) -> Iterator[None]:
        """Around work that may take any time. Afterwards the stage is what it was."""
        before = self.stage
        self.advance(doing, stage)
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1
            self.advance(doing, before)


@dataclass(frozen=True)
class Heartbeat:
    """What one rank was doing at one moment: the content of its heartbeat file."""

    rank: int
    pid: int
    beat: int
    """Grows with every heartbeat."""
    time: str
    """Time of day, UTC, by the rank's own clock."""
    stage: str
    doing: str
    step: int
    stack: list[str] = field(default_factory=list)
    """Of the main thread, innermost last: 'research/reliability/signals.py:44 agreed'."""
    left: str = ""
    """Why the rank has left, one of LEFT; empty while it has not."""
    why: str = ""
    """The same as a sentence."""
    code: int = 0
    """The exit code, if it has left."""

    @property
    def waits(self) -> bool:
        """Whether it was in a collective."""
        return any(place in frame for frame in self.stack for place in WAITING)

    @property
    def where(self) -> str:
        """'in step 12, in all_reduce (called at research/reliability/signals.py:44)': the innermost function, our line that led there."""
        doing = f"in step {self.step}" if self.doing == "step" else f"at {self.doing!r}, step {self.step}"
        if not self.stack:
            return doing
        place, _, function = self.stack[-1].rpartition(" ")
        ours = next((frame.rpartition(" ")[0] for frame in reversed(self.stack) if frame[0] not in "/…<"), place)
        return f"{doing}, in {function} ({place})" if ours == place else f"{doing}, in {function} (called at {ours})"


class Heartbeats:
    """Writes this rank's heartbeat file and reads those of the other ranks."""

    def __init__(self, folder: RunFolder, rank: int, world: int, root: Path) -> None:
        self._folder, self._rank, self._root, self._beat = folder, rank, root, 0
        self._write_lock = threading.Lock()
        self.latest: dict[int, Heartbeat] = {}
        """The last heartbeat read of each other rank that has one."""
        self.silence = dict.fromkeys((other for other in range(world) if other != rank), 0.0)
        """For each other rank, the seconds of watching since its heartbeat last changed."""
        self.watched = 0.0
        """The seconds for which the others have been watched without a pause."""
        self._is_watching = False

    def next(self, progress: Progress, main: int, **departure: Any) -> Heartbeat:
        """A new heartbeat of this rank. `main`: the main thread's identifier; `departure`: left, why and code, if the rank leaves."""
        self._beat += 1
        stack = stack_of(main, self._root) if main != threading.get_ident() else []  # the main thread itself is only busy with this
        now = time.strftime("%H:%M:%S", time.gmtime())
        place = (progress.stage.value, progress.doing, progress.step)
        return Heartbeat(self._rank, os.getpid(), self._beat, now, *place, stack, **departure)

    def write(self, heartbeat: Heartbeat) -> bool:
        """Replaces this rank's heartbeat file atomically; returns False if the file system refuses."""
        path = self._folder.heartbeat(self._rank)
        temporary = path.with_name(f".{path.name}")
        with self._write_lock, contextlib.suppress(OSError):
            temporary.write_text(json.dumps(asdict(heartbeat), indent=1), encoding="utf-8")
            temporary.replace(path)
            return True
        return False

    def read(self, rank: int) -> Heartbeat | None:
        """The heartbeat in a rank's file; None if there is none that can be read."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Heartbeat(**json.loads(self._folder.heartbeat(rank).read_text(encoding="utf-8")))
        return None

    def read_others(self, seconds: float) -> None:
        """Reads the other ranks' heartbeats; `seconds` have passed since the last call."""
        read = {other: heartbeat for other in self.silence if (heartbeat := self.read(other))}
        changed = {other for other, heartbeat in read.items() if heartbeat != self.latest.get(other)}
        # How long a heartbeat has been there is not known before the second look.
        self.watched, self._is_watching = self.watched + seconds if self._is_watching else 0.0, True
        self.silence = {other: 0.0 if other in changed else before + seconds for other, before in self.silence.items()}
        self.latest = self.latest | read  # replaced, not changed: another thread may be reading it

    def reset_silence(self) -> None:
        """Nobody reads for a while: how long the others have been silent is unknown."""
        self.silence = dict.fromkeys(self.silence, 0.0)
        self.watched, self._is_watching = 0.0, False

    def remove_stale(self) -> None:
        """Removes the files of ranks that no longer exist because the run was resumed with fewer."""
        current = {self._folder.heartbeat(rank) for rank in (self._rank, *self.silence)}
        with contextlib.suppress(OSError):
            for path in set(self._folder.logs.glob(HEARTBEATS)) - current:
                path.unlink()

    def remove(self) -> None:
        """Removes this rank's file: it ends as it should."""
        with contextlib.suppress(OSError):
            self._folder.heartbeat(self._rank).unlink(missing_ok=True)


def stack_of(thread: int, root: Path) -> list[str]:
    """The stack of the thread, innermost frame last: 'research/training/loop.py:90 train_steps' with the path relative to `root`.

    A library's file is '…/site-packages/torch/…'. Reads no source file.
    """
    frame: FrameType | None = sys._current_frames().get(thread)
    stack: list[str] = []
    while frame is not None and len(stack) < STACK_DEPTH:
        file = frame.f_code.co_filename
        _, library, tail = file.rpartition("/site-packages/")
        file = f"…{library}{tail}" if library else file.removeprefix(f"{root}/")
        stack.append(f"{file}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return stack[::-1]
