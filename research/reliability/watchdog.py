"""The watchdog: detects a hung, lost or stopped rank from threads that run whatever the main thread is stuck in, and ends this rank.

A rank that ends this way writes no checkpoint (the last one remains valid); its stacks are in its log, the reason is in run.json.
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
from research.cluster.exit_codes import SIGNALLED, TAKEN
from research.reliability.diagnosis import Diagnoser, Diagnosis, diagnose_error
from research.reliability.heartbeat import HANG, OTHERS, SIGNAL, Progress, Stage
from research.reliability.parents import Parents
from research.reliability.peers import Lost, PeerMonitor
from research.reliability.signals import Stop
from research.tracking import run_folder
from research.tracking.run_folder import FAILED, INTERRUPTED, RunFolder
from research.tracking.run_lock import LockView, State

CHECK_SECONDS = 1.0
HEARTBEATS_PER_SECOND = 64
"""Heartbeats that all ranks together write per second; with more ranks each writes less often."""
STDERR = 2
LAST_SECONDS = 5.0
"""Time limit for the report of a rank that leaves: a file system that hangs must not keep a process from leaving."""


class Watchdog:
    """Watches one rank: its main thread, which reports to `progress`, and the other ranks."""

    def __init__(
        self,
        ranks: Ranks,
        root: Path,
        hang_seconds: float,
        parents: Parents,
        start_seconds: float = 0.0,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        """`root`: files in stacks are named relative to it. `leave` ends the process.

        `hang_seconds` 0: hangs are not looked for. Until the end of the first step, the limit is at least `start_seconds`.
        """
        self.progress = Progress()
        self._ranks, self._root, self._exit = ranks, root, leave
        self._diagnoser = Diagnoser(self.progress, parents, hang_seconds, start_seconds)
        self._peers: PeerMonitor | None = None
        self._stop: Stop | None = None
        self._why = ""
        self._lock: LockView | None = None
        self._closed = threading.Event()
        self._signal_read, self._signal_write = os.pipe()
        for end in (self._signal_read, self._signal_write):
            os.set_blocking(end, False)

    @property
    def reason(self) -> str:
        """Why the run was asked to stop or could not go on; '' if neither happened."""
        return self._why or self._diagnoser.reason_of(self._stop.signal if self._stop else self._diagnoser.signal)

    def note_signals(self) -> Stop:
        """From now on a signal takes effect at the end of a step."""
        self._stop = Stop()
        self.progress.advance("before the first step", Stage.TRAINING)
        return self._stop

    @contextlib.contextmanager
    def together(self, folder: RunFolder, lock: LockView | None = None) -> Iterator[None]:
        """Inside, the ranks know each other and write heartbeats into the run's folder. Entering is collective.

        `lock`: the run's lock. This rank leaves if another process takes it over.

        If another rank is gone, Lost is raised instead of torch's exception; SystemExit if that rank was asked to stop.
        """
        self._lock = lock
        self._peers = self._diagnoser.peers = peers = PeerMonitor(folder, self._ranks.rank, self._ranks.world, self._root, self.progress)
        try:
            yield
        except BaseException as error:
            code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 0
            reason = self._diagnoser.reason_of(max(0, code - SIGNALLED))
            diagnosis = diagnose_error(error, reason, peers.lost, peers.vanished, peers.peers)
            self._why = diagnosis.why
            peers.announce(diagnosis.left, diagnosis.why, diagnosis.code)
            self._raise(diagnosis, error, peers)
        finally:
            self._lock = None  # rank 0 gives it up when this rank may still be closing

    def _raise(self, diagnosis: Diagnosis, error: BaseException, peers: PeerMonitor) -> NoReturn:
        if diagnosis.left in (OTHERS, HANG):
            logging.getLogger(__name__).error(diagnosis.why, exc_info=error)
            run_folder.end_unless_ended(peers.folder, FAILED, diagnosis.why, peers.peers[0].process)  # rank 0 may be the lost one
            prints = diagnosis.left == OTHERS and peers.reports({*peers.lost()})  # the rank that found a hang has printed it
            raise Lost(diagnosis.why + _advice(peers) if prints else "", diagnosis.code) from None
        if diagnosis.left == SIGNAL and not isinstance(error, SystemExit):
            raise SystemExit(diagnosis.code) from error
        raise error

    def start(self) -> None:
        """Starts the threads; call it on the main thread. Signals are noticed even while the main thread runs C code."""
        self._before = signal.set_wakeup_fd(self._signal_write, warn_on_full_buffer=False)
        targets = {"watchdog": self._check_until_closed, "heartbeat": self._beat_until_closed}
        self._threads = [threading.Thread(target=target, name=name, daemon=True) for name, target in targets.items()]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """The rank ends as it should, or reports by itself why not."""
        self._closed.set()
        signal.set_wakeup_fd(self._before)
        for thread in self._threads:
            thread.join(LAST_SECONDS)  # a heartbeat written after the file was removed would look like a death
        if self._peers and not self._why:
            self._peers.heartbeats.remove()

    def _check_until_closed(self) -> None:
        for seconds in self._intervals(CHECK_SECONDS):
            with contextlib.suppress(BlockingIOError):
                self._diagnoser.signal = self._diagnoser.signal or os.read(self._signal_read, 1)[0]
            with contextlib.suppress(OSError):  # a file system that fails for a moment is no reason to stop checking
                if diagnosis := self._diagnoser.check(seconds):
                    self._leave(diagnosis)

    def _beat_until_closed(self) -> None:
        for seconds in self._intervals(max(CHECK_SECONDS, self._ranks.world / HEARTBEATS_PER_SECOND)):
            if self._peers:
                lock = self._lock  # which the main thread sets to None when it is done
                if lock and lock.state() is State.TAKEN:  # before the heartbeat: the other process's ranks write theirs now
                    with contextlib.suppress(OSError):
                        os.write(STDERR, f"error  {lock.why_lost(self._peers.folder.title)}\n".encode())
                    self._exit(TAKEN)
                    return
                self._peers.beat(seconds, read_others=self._diagnoser.suspects_others())

    def _intervals(self, every: float) -> Iterator[float]:
        """Seconds that have passed, about `every`, until the watchdog is closed; a long pause of the process counts as a short one."""
        last = time.monotonic()
        while not self._closed.wait(every):
            now = time.monotonic()
            yield min(now - last, 2 * every)
            last = now

    def _leave(self, diagnosis: Diagnosis) -> None:
        """Reports why, kills stopped ranks of this machine, and ends the process without the main thread. LAST_SECONDS at most."""
        timer = threading.Timer(LAST_SECONDS, self._exit, (diagnosis.code,))
        timer.daemon = True
        timer.start()
        stopped, peers = self._diagnoser.stopped(), self._peers

        # one rank prints, unless nothing is lost; past the buffer, whose lock the main thread may hold
        nothing_lost = diagnosis.left == SIGNAL and self.progress.stage is Stage.START
        with contextlib.suppress(Exception):
            if not nothing_lost and (peers is None or peers.reports(stopped | {*peers.lost()})):
                os.write(STDERR, f"error  {diagnosis.why}{_advice(peers)}\n".encode())
        if peers:
            with contextlib.suppress(Exception):
                peers.announce(diagnosis.left, diagnosis.why, diagnosis.code)
                status = INTERRUPTED if diagnosis.left == SIGNAL else FAILED
                run_folder.end_unless_ended(peers.folder, status, diagnosis.why, peers.peers[0].process)
                self._log_stacks(diagnosis, stopped, peers)
            for rank in stopped:
                peers.neighbours.kill(rank)
        self._exit(diagnosis.code)

    def _log_stacks(self, diagnosis: Diagnosis, stopped: set[int], peers: PeerMonitor) -> None:
        """Appends to this rank's log: why it leaves, the last known stacks of stopped ranks, the stacks of its own threads."""
        with peers.folder.rank_log(peers.rank).open("a") as log:
            log.write(f"{run_folder.now()} {diagnosis.why}\n")
            for rank in sorted(stopped & {*peers.heartbeats.latest}):
                log.write("\n".join([f"rank {rank}, as it last said:", *peers.heartbeats.latest[rank].stack, ""]))
            log.flush()
            faulthandler.dump_traceback(log)


def _advice(peers: PeerMonitor | None) -> str:
    """The end of the error: where to look for more."""
    return f" → what each rank was doing is in {peers.folder.logs}; the last checkpoint stands" if peers else ""


@contextlib.contextmanager
def watchdog(ranks: Ranks, root: Path, hang_seconds: float, parents: Parents, start_seconds: float = 0.0) -> Iterator[Watchdog]:
    """Inside, a watchdog watches this rank. Enter it on the main thread."""
    watch = Watchdog(ranks, root, hang_seconds, parents, start_seconds)
    watch.start()
    try:
        yield watch
    finally:
        watch.close()
