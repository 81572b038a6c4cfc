"""Decides when a rank must leave: it was asked to and cannot, another rank is gone, nothing moves any more.

Time is counted in looks, never read off a clock: a job that was suspended (Ctrl-Z, a laptop's lid) has not waited for anything.
"""

import signal

from research.fellows import Fellows, Others, Strangers
from research.parents import LAUNCHER_GONE, Parents
from research.progress import Progress, Stage
from research.sign_of_life import HANG, SIGNAL
from research.signals import SIGNALLED
from research.verdict import Verdict, of_a_hang, of_the_lost

HUNG = 124
"""Exit code of a run that was ended because nothing moved: what timeout(1) returns."""
PATIENCE = {Stage.START: 5.0, Stage.TRAINING: 20.0, Stage.LEAVING: 15.0}
"""Seconds from a signal until the main thread must have done what is asked; a checkpoint may take as long as it takes."""
STEPS_OF_PATIENCE = 3
"""A step that is long by nature is not cut off: patience is at least so many times the last one."""
ALONE_SECONDS, CLOSING_SECONDS = 5.0, 10.0
"""Left to the main thread to find out by itself that another rank is gone (gloo raises, NCCL waits), and then to close its files."""
SILENT_SECONDS = 8.0
"""Without a sign of life for so long, another rank is taken for stopped where this one cannot end."""


class Judge:
    """Counts what has passed from look to look. The watching thread's own; `others` is replaced once the ranks have met."""

    def __init__(self, progress: Progress, parents: Parents, hang_seconds: float) -> None:
        """`hang_seconds` without progress are a hang; 0: none is."""
        self.others: Others = Strangers()
        self.signal = 0
        """The first signal that has come; 0: none."""
        self.idle = 0.0
        self._progress, self._parents, self._hang_seconds = progress, parents, hang_seconds
        self._moves, self._asked, self._alone = -1, 0.0, 0.0

    def reason_of(self, number: int) -> str:
        """Why the run was asked to stop with this signal; '' where it was with none (0)."""
        if number == signal.SIGTERM and self._parents.look():
            return LAUNCHER_GONE
        return signal.Signals(number).name if number else ""

    @property
    def uneasy(self) -> bool:
        """Whether it is time to listen closely to the others."""
        return bool(self.signal or (self._hang_seconds and self.idle >= self._hang_seconds / 10))

    def look(self, seconds: float) -> Verdict | None:
        """One look, `seconds` after the last; a verdict where this rank must leave."""
        self._count(seconds)
        if self._alone >= (CLOSING_SECONDS if self._progress.stage is Stage.LEAVING else ALONE_SECONDS):
            return self._of_the_lost()
        if self.signal and self._asked >= self.patience():
            return Verdict(SIGNALLED + self.signal, SIGNAL, f"{self.reason_of(self.signal)}, but {self._stuck()}")
        if self._hang_seconds and self._hangs():
            return Verdict(HUNG, HANG, self._stuck())
        return None

    def _count(self, seconds: float) -> None:
        moves = self._progress.moves
        self.idle = self.idle + seconds if moves == self._moves else 0.0
        self._moves = moves
        saving = self._progress.stage is Stage.SAVING
        self._asked = self._asked + seconds if self.signal and not saving else 0.0
        self._alone = self._alone + seconds if self.others.lost() else 0.0

    def patience(self) -> float:
        """Seconds from a signal until this rank must be gone, as things are."""
        stage = self._progress.stage
        steps = STEPS_OF_PATIENCE * self._progress.step_seconds if stage is Stage.TRAINING else 0.0
        return max(PATIENCE.get(stage, float("inf")), steps)

    def _hangs(self) -> bool:
        """Nothing has moved here; or another rank has given no sign of life, while this one waits for work of any length."""
        return (self.idle >= self._hang_seconds and not self._progress.busy) or bool(self.others.silent(self._hang_seconds))

    def stopped(self) -> set[int]:
        """Other ranks that are taken for stopped, now that this one has to leave."""
        return self.others.silent(min(SILENT_SECONDS, self._hang_seconds / 2 or SILENT_SECONDS))

    def _of_the_lost(self) -> Verdict:
        assert isinstance(self.others, Fellows)
        return of_the_lost(self.others.lost(), self.others.peers)

    def _stuck(self) -> str:
        """Where this rank, and who else, has got stuck."""
        if not isinstance(self.others, Fellows):
            return f"no progress for {self.idle:.0f} s while the ranks meet: one of them is missing"
        signs = self.others.signs
        seconds = max([self.idle, *signs.silence.values()])
        return of_a_hang(seconds, signs.heard | {self.others.rank: self.others.own()}, self.stopped(), self.others.peers)
