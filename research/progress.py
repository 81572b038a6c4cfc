"""What a rank's main thread is doing, for its watching thread to read: at which stage, on which step, and whether it gets on."""

import contextlib
import time
from collections.abc import Iterator
from enum import Enum


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
