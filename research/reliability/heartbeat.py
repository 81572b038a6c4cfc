"""Signs of life: a small file for each rank in logs/, which says what the rank is doing; the others watch whether it still changes.

Times of two machines are never compared, and no file's time is read: what counts is whether the content has changed while the
reader was looking. So neither a wrong clock nor a file system that is shared over a network makes a rank look dead.
"""
# MERGED-DOC """What a rank's main thread is doing, for its watching thread to read: at which stage, on which step, and whether it gets on."""

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

from research.tracking.run_folder import RunFolder


class Stage(Enum):
    """What a signal finds: nothing to keep yet; steps and validations that end; a checkpoint being written; nothing left to do."""

    START = "start-up"
    TRAINING = "training"
    SAVING = "saving"
    LEAVING = "leaving"


class Progress:
    """Written by the main thread, one attribute at a time; read by another."""

    def __init__(self) -> None:
        self.stage = Stage.START
        self.doing = "starting"
        self.step = 0
        self.moves = 0
        """Grows whenever something is done. Nothing else counts as progress."""
        self.busy = 0
        """> 0 inside of work whose length nobody knows: that it does not move says nothing."""
        self.step_seconds = 0.0
        """What the last step took."""
        self._stepped = 0.0

    def advance(self, doing: str, stage: Stage | None = None) -> None:
        """One thing is done, the next begins; `stage` where that changes."""
        self.doing, self.stage, self._stepped = doing, stage or self.stage, 0.0
        self.moves += 1

    def stepping(self, step: int) -> None:
        """Step number `step` begins, the one before it is done."""
        now = time.monotonic()
        self.step_seconds = now - self._stepped if self._stepped else self.step_seconds
        self.advance("step", Stage.TRAINING)
        self.step, self._stepped = step, now

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


DEPTH = 40
"""Frames of a stack that are kept, the innermost."""
WAITING = ("torch/distributed/", "deepspeed/comm/", "deepspeed/runtime/pipe/p2p.py")
"""A stack with one of these files in it waits for other ranks (or sends to them)."""
FAULT, SIGNAL, OTHERS, HANG = LEFT = ("fault", "signal", "others", "hang")
"""A rank leaves before the end because it raised, because it was asked to, because another had left, or because nothing moved."""


@dataclass(frozen=True)
class Heartbeat:
    """What a rank says of itself."""

    rank: int
    pid: int
    beat: int
    """Grows with every sign."""
    time: str
    """Of day, UTC, by the rank's own clock."""
    stage: str
    doing: str
    step: int
    stack: list[str] = field(default_factory=list)
    """Of the main thread, innermost last: 'research/reliability/signals.py:44 agreed'."""
    left: str = ""
    """Why the rank has left, one of LEFT; empty while it has not."""
    why: str = ""
    """The same for a person."""
    code: int = 0
    """Its exit code, where it has left."""

    @property
    def waits(self) -> bool:
        """Whether it was in the middle of a collective."""
        return any(place in frame for frame in self.stack for place in WAITING)

    @property
    def where(self) -> str:
        """'in step 12, in all_reduce, called at research/reliability/signals.py:44': the innermost function, and the line of ours that led there."""
        said = f"in step {self.step}" if self.doing == "step" else f"at {self.doing!r}, step {self.step}"
        if not self.stack:
            return said
        place, _, function = self.stack[-1].rpartition(" ")
        ours = next((frame.rpartition(" ")[0] for frame in reversed(self.stack) if frame[0] not in "/…<"), place)
        return f"{said}, in {function} ({place})" if ours == place else f"{said}, in {function} (called at {ours})"


class Heartbeats:
    """This rank's sign, and what it has heard of the others."""

    def __init__(self, folder: RunFolder, rank: int, world: int, root: Path) -> None:
        self._folder, self._rank, self._root, self._beat = folder, rank, root, 0
        self._pen = threading.Lock()
        self._farewell: dict[str, Any] = {}
        self.heard: dict[int, Heartbeat] = {}
        """The last sign of each other rank, where there is one."""
        self.silence = dict.fromkeys((other for other in range(world) if other != rank), 0.0)
        """Seconds of listening since each other rank's sign has changed."""

    def own(self, progress: Progress, main: int) -> Heartbeat:
        """A new sign of this rank; `main` is the main thread's number."""
        self._beat += 1
        stack = stack_of(main, self._root) if main != threading.get_ident() else []  # the main thread itself is only busy with this
        now = time.strftime("%H:%M:%S", time.gmtime())
        place = (progress.stage.value, progress.doing, progress.step)
        return Heartbeat(self._rank, os.getpid(), self._beat, now, *place, stack, **self._farewell)

    def farewell(self, left: str, why: str, code: int) -> None:
        """From now on this rank's signs say that it leaves."""
        self._farewell = {"left": left, "why": why, "code": code}

    def give(self, sign: Heartbeat) -> bool:
        """Puts the sign in the place of this rank's last one; False where the file system refuses."""
        path = self._folder.sign(self._rank)
        temporary = path.with_name(f".{path.name}")
        with self._pen, contextlib.suppress(OSError):
            temporary.write_text(json.dumps(asdict(sign), indent=1), encoding="utf-8")
            temporary.replace(path)
            return True
        return False

    def listen(self, seconds: float) -> None:
        """Reads the other ranks' signs; `seconds` have passed since the last time."""
        read = {other: sign for other in self.silence if (sign := self.read(other))}
        changed = {other for other, sign in read.items() if sign != self.heard.get(other)}
        self.silence = {other: 0.0 if other in changed else before + seconds for other, before in self.silence.items()}
        self.heard = self.heard | read  # replaced, not changed: another thread may be reading it

    def rest(self) -> None:
        """Nobody listens for a while: how long the others have been silent is not known any more."""
        self.silence = dict.fromkeys(self.silence, 0.0)

    def read(self, rank: int) -> Heartbeat | None:
        """The sign of a rank as it lies there; None where there is none that can be read."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Heartbeat(**json.loads(self._folder.sign(rank).read_text(encoding="utf-8")))
        return None

    def forget_others(self) -> None:
        """Removes signs of ranks that there are no more, since the run has gone on with fewer."""
        with contextlib.suppress(OSError):
            for path in set(self._folder.logs.glob("rank_*.alive.json")) - {
                self._folder.sign(rank) for rank in (self._rank, *self.silence)
            }:
                path.unlink()

    def remove(self) -> None:
        """This rank has nothing more to say: it ends as it should."""
        with contextlib.suppress(OSError):
            self._folder.sign(self._rank).unlink(missing_ok=True)


def stack_of(thread: int, root: Path) -> list[str]:
    """Where the thread is, innermost last; files as seen from `root`. Reads no source file."""
    frame: FrameType | None = sys._current_frames().get(thread)
    found: list[str] = []
    while frame is not None and len(found) < DEPTH:
        found.append(f"{_short(frame.f_code.co_filename, root)}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return found[::-1]


def _short(file: str, root: Path) -> str:
    """'research/training/loop.py', or '…/site-packages/torch/…' for a library's."""
    head, found, tail = file.rpartition("/site-packages/")
    return f"…{found}{tail}" if found else file.removeprefix(f"{root}/")
