"""Watches over a rank while it trains, from threads that run whatever the main thread is stuck in, and carries out what is decided.

A rank that has to leave this way writes no checkpoint, the last one stands; its stacks are in its log, the reason in run.json.
"""

import contextlib
import faulthandler
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from research.cluster.environment import Ranks
from research.cluster.exit_codes import SIGNALLED
from research.reliability.diagnosis import Diagnosis, Judge, of_an_error
from research.reliability.heartbeat import HANG, OTHERS, SIGNAL, Progress, Stage
from research.reliability.parents import Parents
from research.reliability.peers import Lost, PeerMonitor
from research.reliability.signals import Stop
from research.tracking import run_folder
from research.tracking.run_folder import FAILED, INTERRUPTED, RunFolder

LOOK_SECONDS = 1.0
RANKS_A_SECOND = 64
"""Signs of life that are left in all: where there are more ranks, each leaves one less often."""
STDERR = 2
LAST_SECONDS = 5.0
"""For last words: a file system that hangs must not keep a process from leaving."""


class Watchdog:
    """One rank's watch over itself and the others. The main thread tells `progress` where it is."""

    def __init__(self, ranks: Ranks, root: Path, hang_seconds: float, parents: Parents, leave: Callable[[int], object] = os._exit) -> None:
        """`root`: files in stacks are named relative to it; `hang_seconds` 0: a hang is not looked for; `leave` ends the process with an exit code."""
        self.progress = Progress()
        self._ranks, self._root, self._exit = ranks, root, leave
        self._judge = Judge(self.progress, parents, hang_seconds)
        self._fellows: PeerMonitor | None = None
        self._stop: Stop | None = None
        self._why = ""
        self._closed = threading.Event()
        self._ears, self._mouth = os.pipe()
        for end in (self._ears, self._mouth):
            os.set_blocking(end, False)

    @property
    def reason(self) -> str:
        """Why the run was asked to stop, or could not go on; '' where neither happened."""
        return self._why or self._judge.reason_of(self._stop.signal if self._stop else self._judge.signal)

    def note_signals(self) -> Stop:
        """From now on a signal waits for the step's end."""
        self._stop = Stop()
        self.progress.advance("before the first step", Stage.TRAINING)
        return self._stop

    @contextlib.contextmanager
    def together(self, folder: RunFolder) -> Iterator[None]:
        """Inside, the ranks know of each other and leave signs of life in the run's folder. Entering is collective.

        Where another rank is gone, Lost is raised instead of what torch says; SystemExit where that one was asked to stop.
        """
        fellows = PeerMonitor(folder, self._ranks.rank, self._ranks.world, self._root, self.progress)
        self._fellows = self._judge.others = fellows
        try:
            yield
        except BaseException as error:
            asked = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 0
            reason = self._judge.reason_of(max(0, asked - SIGNALLED))
            verdict = of_an_error(error, reason, fellows.lost, fellows.peers)
            self._why = verdict.why
            self._farewell(fellows, verdict)
            self._raise(verdict, error, fellows)

    def _raise(self, verdict: Diagnosis, error: BaseException, fellows: PeerMonitor) -> NoReturn:
        if verdict.left in (OTHERS, HANG):
            logging.getLogger(__name__).error(verdict.why, exc_info=error)
            run_folder.end_unless_ended(fellows.folder, FAILED, verdict.why)  # rank 0 may be the lost one
            speaks = verdict.left == OTHERS and fellows.speaks({*fellows.lost()})  # who found the hang has said so
            raise Lost(verdict.why + self._way_out(fellows) if speaks else "", verdict.code) from None
        if verdict.left == SIGNAL and not isinstance(error, SystemExit):
            raise SystemExit(verdict.code) from error
        raise error

    def start(self) -> None:
        """Begin to look; on the main thread. A signal is heard while that is inside of C, too."""
        self._before = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)
        self._threads = [threading.Thread(target=run, name=f"watch{run.__name__}", daemon=True) for run in (self._look, self._sign)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """The rank ends as it should, or says itself why not."""
        self._closed.set()
        signal.set_wakeup_fd(self._before)
        for thread in self._threads:
            thread.join(LAST_SECONDS)  # a sign that is given after it was taken away would look like a death
        if self._fellows and not self._why:
            self._fellows.signs.remove()

    def _look(self) -> None:
        for seconds in self._ticks(LOOK_SECONDS):
            with contextlib.suppress(BlockingIOError):
                self._judge.signal = self._judge.signal or os.read(self._ears, 1)[0]
            with contextlib.suppress(OSError):  # a file system that fails for a moment is no reason to stop looking
                if verdict := self._judge.look(seconds):
                    self._leave(verdict)

    def _sign(self) -> None:
        for seconds in self._ticks(max(LOOK_SECONDS, self._ranks.world / RANKS_A_SECOND)):
            if self._fellows:
                self._fellows.listen(seconds, closely=self._judge.uneasy)

    def _ticks(self, every: float) -> Iterator[float]:
        """Seconds that have passed, about `every`, until the watch is closed; a long pause of the whole process counts as a short one."""
        last = time.monotonic()
        while not self._closed.wait(every):
            now = time.monotonic()
            yield min(now - last, 2 * every)
            last = now

    def _leave(self, verdict: Diagnosis) -> None:
        """Say why, write it down, take stopped ranks of this machine along, and be gone; the main thread is not asked."""
        timer = threading.Timer(LAST_SECONDS, self._exit, (verdict.code,))
        timer.daemon = True
        timer.start()
        stopped = self._judge.stopped()
        with contextlib.suppress(Exception):
            self._say(verdict, stopped)
        if self._fellows:
            with contextlib.suppress(Exception):
                self._write_down(verdict, stopped, self._fellows)
            for rank in stopped:
                self._fellows.neighbours.kill(rank)
        self._exit(verdict.code)

    def _say(self, verdict: Diagnosis, stopped: set[int]) -> None:
        """On one rank's standard error, unless nothing is lost; past the buffer, whose lock the main thread may hold."""
        fellows, nothing_lost = self._fellows, verdict.left == SIGNAL and self.progress.stage is Stage.START
        if not nothing_lost and (fellows is None or fellows.speaks(stopped | {*fellows.lost()})):
            os.write(STDERR, f"error  {verdict.why}{self._way_out(fellows)}\n".encode())

    def _write_down(self, verdict: Diagnosis, stopped: set[int], fellows: PeerMonitor) -> None:
        """In run.json, and with all stacks in this rank's log."""
        self._farewell(fellows, verdict)
        run_folder.end_unless_ended(fellows.folder, INTERRUPTED if verdict.left == SIGNAL else FAILED, verdict.why)
        with fellows.folder.rank_log(fellows.rank).open("a") as log:
            log.write(f"{run_folder.now()} {verdict.why}\n")
            for rank in sorted(stopped & {*fellows.signs.heard}):
                log.write("\n".join([f"rank {rank}, as it last said:", *fellows.signs.heard[rank].stack, ""]))
            log.flush()
            faulthandler.dump_traceback(log)

    def _way_out(self, fellows: PeerMonitor | None) -> str:
        return f" → what each rank was doing is in {fellows.folder.logs}; the last checkpoint stands" if fellows else ""

    def _farewell(self, fellows: PeerMonitor, verdict: Diagnosis) -> None:
        fellows.signs.farewell(verdict.left, verdict.why, verdict.code)
        fellows.signs.give(fellows.own())


@contextlib.contextmanager
def watchdog(ranks: Ranks, root: Path, hang_seconds: float, parents: Parents) -> Iterator[Watchdog]:
    """This rank is watched inside. On the main thread."""
    watch = Watchdog(ranks, root, hang_seconds, parents)
    watch.start()
    try:
        yield watch
    finally:
        watch.close()
