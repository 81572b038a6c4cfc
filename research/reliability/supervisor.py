"""One launch as a child of this process: signals go on to all of it, and when it is over nothing of it is left."""
# MERGED-DOC """What a launch has left on disk, seen from outside: which run it made or went on with, how that ended, how far it is saved."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from parallel.files import read_json
from research.cluster.exit_codes import SIGNALLED
from research.reliability import parents
from research.reliability.parents import LAUNCHER_GONE
from research.reliability.signals import SIGNALS, catch
from research.tracking import run_folder
from research.tracking.run_folder import FINISHED, INTERRUPTED, RunFolder

GRACE_SECONDS = 60.0
"""After the launcher's end its ranks may still be saving: so long, then they are killed."""


class Launcher:
    """Starts launches, one at a time, and passes signals on. One for a process, on its main thread."""

    def __init__(self) -> None:
        """From now on this process outlives SIGINT, SIGTERM, SIGUSR1 and SIGHUP."""
        self.signal = 0
        """The first that has come; 0: none."""
        self._child: subprocess.Popen[bytes] | None = None
        parents.adopt_orphans()
        catch(self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)

    def run(self, command: list[str]) -> int:
        """The exit code (-n: by signal n) of the command, in a session of its own; all that it has started is gone then.

        Its output is this process's. It gets SIGTERM should this process be killed.
        """
        self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_ends_with_parent)
        if self.signal:  # it came while the process was being made
            self._pass_on(self.signal, None)
        code = self._child.wait()
        self._clear(self._child.pid)
        self._child = None
        return code

    def _clear(self, group: int) -> None:
        """Waits for what the command has left behind, then kills it: this process's descendants, and no others."""
        ends = time.monotonic() + GRACE_SECONDS
        while left := _descendants():
            if time.monotonic() > ends:
                for process in left:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
            time.sleep(0.1)
            _reap()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)  # where orphans are not adopted

    def pause(self, seconds: float) -> None:
        """Sleeps, but not through a signal."""
        ends = time.monotonic() + seconds
        while not self.signal and time.monotonic() < ends:
            time.sleep(0.1)


def _ends_with_parent() -> None:
    """In the child, before it becomes the command."""
    parents.tell_of_parents_death(signal.SIGTERM)


def _descendants() -> list[psutil.Process]:
    """Those that have not ended."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _reap() -> None:
    """Asks for the exit codes of adopted processes, so that they do not stay as zombies."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


RESUME = "--resume"


class LaunchRecord:
    """The runs of one experiment, before and after a launch."""

    def __init__(self, runs: Path) -> None:
        """`runs` is the folder NAME/ that holds ID/ of each run."""
        self._runs = runs
        self._before: dict[Path, tuple[bytes, int]] = {}
        self.run: RunFolder | None = None
        """The one that the last launch has made or gone on with; None where it has not come so far."""
        self.last = -1
        """The step up to which it was saved when it was looked at; −1: no checkpoint."""

    def begin(self) -> None:
        """A launch begins: all run.json that change from now on are its own."""
        self._before = {path: (path.read_bytes(), saved_step(RunFolder(path.parent))) for path in self._files()}
        self.run = None

    def end(self) -> bool:
        """The launch is over; whether there is a newer checkpoint than before it, and than when one was looked at last."""
        changed = [path for path in self._files() if path.read_bytes() != self._before.get(path, (b"", -1))[0]]
        if not changed:
            return False
        newest = max(changed, key=lambda path: path.stat().st_mtime)
        self.run = RunFolder(newest.parent)
        known = max(self._before.get(newest, (b"", -1))[1], self.last)
        self.last = saved_step(self.run)
        return self.last > known

    def _files(self) -> list[Path]:
        return [path for path in self._runs.glob("*/run.json") if not path.parent.is_symlink()]

    def state(self) -> tuple[str, str]:
        """The run's status and its reason; '' each where there is no run."""
        run: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            run = read_json(self.run.run) if self.run else {}
        return (run_folder.status(run) if run else "", str(run.get("reason", "")))

    def settings(self, given: list[str]) -> list[str]:
        """What the next launch is given: the same, and to go on from the last checkpoint where there is one.

        `auto` names the newest run; where another has been started meanwhile, this one is named by its folder.
        """
        if self.run is None or self.last < 0:
            return given
        newest = (self._runs / "latest").resolve() == self.run.path.resolve()
        return [*_without_resume(given), RESUME, "auto" if newest else str(self.run.path)]


def saved_step(run: RunFolder) -> int:
    """The step of the checkpoint that `latest` names, −1 where there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        name = (run.checkpoints / "latest").read_text().strip()
        return int(json.loads((run.checkpoints / name / "manifest.json").read_bytes())["step"])
    return -1


def _without_resume(given: list[str]) -> list[str]:
    """The settings less `--resume X` and `--resume=X`."""
    kept = []
    skip = False
    for word in given:
        if not skip and word.partition("=")[0] != RESUME:
            kept.append(word)
        skip = word == RESUME
    return kept


FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
NOT_AGAIN = (2, 3)
"""Exit codes that the same launch would only give again: a mistake, and a run that has stopped itself."""
STOPPED = {code for number in SIGNALS for code in (-number, SIGNALLED + number)} | {256 - number for number in SIGNALS if number > 1}
"""Exit codes of what a signal has ended: by itself, as shells write it, and as DeepSpeed passes on the first (not SIGHUP: 255 is ssh's)."""


class Outcome(Enum):
    """What is to be done after a launch: nothing more, for one of two reasons, or another one."""

    OVER = "over"
    STOPPED = "stopped"
    CRASHED = "crashed"


def supervise(command: list[str], settings: list[str], record: LaunchRecord, restarts: int) -> int:
    """Launches `command` with `settings` until there is nothing more to do; returns the exit code."""
    launches, given, tries = Launcher(), settings, 0
    while True:
        record.begin()
        code = launches.run([*command, *given])
        tries = 0 if record.end() else tries
        outcome = outcome_of(code, launches.signal, *record.state())
        if outcome is not Outcome.CRASHED or tries == restarts:
            break
        pause = pause_before(tries)
        tries, given = tries + 1, record.settings(settings)
        _say(f"{_crash(code, record)} → launched again in {pause:.0f} s (restart {tries} of {restarts} without a newer checkpoint)")
        launches.pause(pause)
        if launches.signal:
            break
    if outcome is Outcome.CRASHED and not launches.signal:
        _say(f"gives up: {_crash(code, record)}, {tries} restarts have brought no newer checkpoint")
    return _shown(-launches.signal if launches.signal and outcome is not Outcome.OVER else code)


def pause_before(restart: int) -> float:
    """Seconds before the restart of this number, from 0."""
    return min(FIRST_PAUSE * 2**restart, LONGEST_PAUSE)


def outcome_of(code: int, signalled: int, status: str, reason: str) -> Outcome:
    """Judged by the launch's exit code, the signal that went on to it (0: none), and what run.json says: launchers give 0 for anything."""
    if status == FINISHED or code in NOT_AGAIN:
        return Outcome.OVER
    stopped = status == INTERRUPTED and not reason.startswith(LAUNCHER_GONE)
    return Outcome.STOPPED if signalled or stopped or code in STOPPED else Outcome.CRASHED


def _crash(code: int, record: LaunchRecord) -> str:
    """'exit code 1 at step 120 of runs/x/7f3a2c (RuntimeError: …)', as far as it is known."""
    where = f" after a checkpoint at step {record.last}" if record.last >= 0 else " before any checkpoint"
    reason = record.state()[1]
    folder = f", {record.run.title}" if record.run else ""
    return f"exit code {_shown(code)}{where}{folder}" + (f" ({reason})" if reason else "")


def _shown(code: int) -> int:
    """The exit code as a shell shows it."""
    return SIGNALLED - code if code < 0 else code


def _say(text: str) -> None:
    sys.stderr.write(f"supervise  {text}\n")
    sys.stderr.flush()
