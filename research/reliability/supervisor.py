"""Supervises a launch: runs it as a child process and launches it again after a crash, from its last checkpoint (`supervise`).

`Launcher` runs one launch: signals are passed on to all of its processes, and none of them is left when it is over.
`LaunchRecord` reads from disk which run a launch made or resumed, how that ended, and up to which step it is saved.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import psutil

from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.manifest import MAX_BYTES, MOST_VALUES
from parallel.errors import Mistake
from parallel.files import read_json
from research.cluster.exit_codes import DAMAGED, DISK, NOT_AGAIN, SIGNALLED
from research.reliability.parents import LAUNCHER_GONE, PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, prctl
from research.reliability.signals import SIGNALS, catch
from research.tracking import run_folder, run_status
from research.tracking.run_folder import FINISHED, INTERRUPTED, RunFolder

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before a restart: doubled with each one that brings no newer checkpoint."""
GRACE_SECONDS = 60.0
"""After the launcher's end its ranks may still be saving: after this long they are killed."""
DISK_PAUSES = (60.0, 600.0)
"""The first and the longest pause after a launch whose disk was full: a person has to make room. They do not count as restarts."""
STOPPED = {code for number in SIGNALS for code in (-number, SIGNALLED + number)} | {256 - number for number in SIGNALS if number > 1}
"""Exit codes of what a signal has ended: directly, as shells write it, and as DeepSpeed passes on the first (not SIGHUP: 255 is ssh's)."""
RESUME = "--resume"


class Outcome(Enum):
    """What follows after a launch: nothing more, for one of two reasons, or another launch, for one of three."""

    OVER = "over"
    STOPPED = "stopped"
    CRASHED = "crashed"
    DISK_FULL = "disk full"
    DAMAGED = "damaged"


class Launcher:
    """Runs launches, one at a time, and passes signals on. One per process, on its main thread."""

    def __init__(self) -> None:
        """From now on SIGINT, SIGTERM, SIGUSR1 and SIGHUP do not end this process."""
        self.signal = 0
        """The first signal received; 0: none."""
        self.signals = 0
        """How many signals have been received."""
        self._child: subprocess.Popen[bytes] | None = None
        prctl(PR_SET_CHILD_SUBREAPER, 1)  # so that processes that a launch leaves behind can be found
        catch(self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal, self.signals = self.signal or number, self.signals + 1
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        if self._child is not None and self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)
        elif self._child is not None:  # it has ended, and its number may be another's by now; its ranks may still be saving
            for process in descendants():
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)

    def run(self, command: list[str]) -> int:
        """Runs the command in a session of its own; returns its exit code (−n: ended by signal n) once all its processes are gone.

        Its output is this process's. It gets SIGTERM if this process is killed.
        """
        sigterm_with_parent = functools.partial(prctl, PR_SET_PDEATHSIG, signal.SIGTERM)
        self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=sigterm_with_parent)
        if self.signal:  # received while the process was being made
            self._pass_on(self.signal)
        code = self._child.wait()
        self._clear(self._child.pid)
        self._child = None
        return code

    def _clear(self, group: int) -> None:
        """Waits for the processes that the command has left behind, then kills them: this process's descendants, and no others."""
        ends = time.monotonic() + GRACE_SECONDS
        while left := descendants():
            if time.monotonic() > ends:
                for process in left:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
            time.sleep(0.1)
            with contextlib.suppress(ChildProcessError):  # read adopted processes' exit codes, so that they do not stay as zombies
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
        if sys.platform != "linux":  # orphans are not adopted, so descendants may have been missed
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)

    def pause(self, seconds: float) -> None:
        """Sleeps until the time is over or a signal comes."""
        ends = time.monotonic() + seconds
        while not self.signal and time.monotonic() < ends:
            time.sleep(0.1)


def descendants() -> list[psutil.Process]:
    """This process's descendants, zombies excepted."""
    descendants = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                descendants.append(process)
    return descendants


class LaunchRecord:
    """The runs of one experiment, before and after a launch."""

    def __init__(self, runs: Path, is_ours: Callable[[RunFolder], bool]) -> None:
        """`runs` is the folder NAME/ that holds ID/ of each run; `is_ours` tells the launch's runs from those with other settings."""
        self._runs, self._is_ours = runs, is_ours
        self._before: dict[Path, tuple[bytes, int]] = {}
        self.run: RunFolder | None = None
        """The run that the last launch has made or resumed; None if it did not come that far."""
        self.known: RunFolder | None = None
        """The run of the last launch that came that far: the one to go on with."""
        self.last = -1
        """The step of its newest checkpoint when the last launch ended; −1: none."""

    def begin(self) -> None:
        """A launch begins: every run.json that changes from now on is its own."""
        self._before = {path: (content, saved_step(RunFolder(path.parent))) for path, (content, _) in self._files().items()}
        self.run = None

    def end(self) -> bool:
        """The launch is over; returns whether there is a newer checkpoint than before it and than after the launch before."""
        files = self._files()
        changed = [path for path, (content, _) in files.items() if content != self._before.get(path, (b"", -1))[0]]
        changed = [path for path in changed if self._is_ours(RunFolder(path.parent))]
        if not changed:
            return False
        newest = max(changed, key=lambda path: files[path][1])
        self.run = self.known = RunFolder(newest.parent)
        known = max(self._before.get(newest, (b"", -1))[1], self.last)
        self.last = saved_step(self.run)
        return self.last > known

    def _files(self) -> dict[Path, tuple[bytes, int]]:
        """Every run.json, what it holds, and when it was written, in nanoseconds. Another launch may just be removing one."""
        files = {}
        for folder in run_folder.of_experiment(self._runs):
            with contextlib.suppress(OSError):
                files[folder.run] = (folder.run.read_bytes(), folder.run.stat().st_mtime_ns)
        return files

    def state(self) -> tuple[str, str]:
        """The run's status and its reason; '' each if there is no run."""
        run: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            run = run_folder.read_run(self.run) if self.run else {}
        return (run_status.status(run, self.run) if self.run and run else "", str(run.get("reason", "")))

    def code(self, launched: int) -> int:
        """The exit code of the run's rank 0, if its run.json has one, else `launched`: some launchers have only codes of their own."""
        with contextlib.suppress(OSError, ValueError):
            kept = run_folder.read_run(self.run).get("code") if self.run else None
            return kept if isinstance(kept, int) and kept else launched
        return launched

    def set_damaged_aside(self) -> str:
        """Sets the run's damaged checkpoints aside, those whose hashes are wrong too; returns what was damaged, as a sentence.

        '' if none is, or if another process holds the run.
        """
        if self.known is None:
            return ""
        with contextlib.suppress(OSError, Mistake):
            lock = run_status.take_lock(self.known, "supervise")
            try:
                whole, damaged = checkpoint_folder.newest_whole(checkpoint_folder.steps(self.known.checkpoints), hashes=True)
                checkpoint_folder.set_aside(damaged)
            finally:
                lock.release()
            self.last = saved_step(self.known)
            goes_on = f"goes on from {whole.name}" if whole else "no other checkpoint is whole"
            return f"{'; '.join(damaged.values())}: set aside, {goes_on}" if damaged else ""
        return ""

    def settings(self, settings: list[str]) -> list[str]:
        """The settings of the next launch: the same, and --resume with the run's folder if there is a checkpoint."""
        if self.known is None or self.last < 0:
            return settings
        without_resume, skip = [], False  # drop `--resume X` and `--resume=X`
        for argument in settings:
            if not skip and argument.partition("=")[0] != RESUME:
                without_resume.append(argument)
            skip = argument == RESUME
        return [*without_resume, RESUME, str(self.known.path)]


def saved_step(run: RunFolder) -> int:
    """The step of the checkpoint that `latest` names; −1 if there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        name = (run.checkpoints / "latest").read_text().strip()
        return int(read_json(run.checkpoints / name / "manifest.json", MAX_BYTES, MOST_VALUES)["step"])
    return -1


class Launches(Protocol):
    """How one launch is done, where that is more than to run a command (research/reliability/hosts.py)."""

    def run(self, launcher: Launcher, settings: Sequence[str], last: RunFolder | None) -> int:
        """One launch with these settings; returns its exit code once all its processes are gone.

        `last`: the run of the launch before, if that came so far.
        """


def supervise(command: list[str], settings: list[str], record: LaunchRecord, restarts: int, on_hosts: Launches | None = None) -> int:
    """Launches `command` with `settings`, again after each crash, but `restarts` times at most without a newer checkpoint.

    After a launch whose disk was full it waits longer, and does not count it; damaged checkpoints are set aside first.
    `on_hosts` does the launches over several hosts. Returns the last launch's exit code, as a shell shows it.
    """
    launcher, arguments, tries, full = Launcher(), settings, 0, 0
    while True:
        record.begin()
        code = on_hosts.run(launcher, arguments, record.known) if on_hosts else launcher.run([*command, *arguments])
        tries = 0 if record.end() else tries
        outcome = outcome_of(record.code(code), launcher.signal, *record.state())
        full = full + 1 if outcome is Outcome.DISK_FULL else 0
        if outcome in (Outcome.OVER, Outcome.STOPPED) or (tries == restarts and not full):
            break
        damage = record.set_damaged_aside() if outcome is Outcome.DAMAGED else ""
        if outcome is Outcome.DAMAGED and not damage:  # the checkpoint was named by whoever launched: the same would happen again
            break
        why, pause = _crash(code, record) + (f"; {damage}" if damage else ""), pause_before(tries)
        if full:
            pause = min(DISK_PAUSES[0] * 2 ** (full - 1), DISK_PAUSES[1])
            counted = "the disk is full: make room; this does not count as a restart"
        else:
            tries += 1
            counted = f"restart {tries} of {restarts} without a newer checkpoint"
        arguments = record.settings(settings)
        say(f"{why} → launched again in {pause:.0f} s ({counted})")
        launcher.pause(pause)
        if launcher.signal:
            break
    if outcome is Outcome.CRASHED and not launcher.signal:
        say(f"gives up: {_crash(code, record)}, {tries} restarts have brought no newer checkpoint")
    return _as_in_a_shell(-launcher.signal if launcher.signal and outcome is not Outcome.OVER else code)


def pause_before(restart: int) -> float:
    """Seconds before the restart of this number, from 0."""
    return min(FIRST_PAUSE * 2**restart, LONGEST_PAUSE)


def outcome_of(code: int, signalled: int, status: str, reason: str) -> Outcome:
    """The outcome by a launch's exit code, the signal passed on to it (0: none), and run.json: launchers return 0 for anything."""
    if status == FINISHED or code in NOT_AGAIN:
        return Outcome.OVER
    if code in (DISK, DAMAGED) and not signalled:
        return Outcome.DISK_FULL if code == DISK else Outcome.DAMAGED
    stopped = status == INTERRUPTED and not reason.startswith(LAUNCHER_GONE)
    return Outcome.STOPPED if signalled or stopped or code in STOPPED else Outcome.CRASHED


def _crash(code: int, record: LaunchRecord) -> str:
    """'exit code 1 after a checkpoint at step 120, gpt_sotu-7f3a2c (RuntimeError: …)', as far as it is known."""
    where = f" after a checkpoint at step {record.last}" if record.last >= 0 else " before any checkpoint"
    reason = record.state()[1]
    folder = f", {record.run.title}" if record.run else ""
    return f"exit code {_as_in_a_shell(code)}{where}{folder}" + (f" ({reason})" if reason else "")


def _as_in_a_shell(code: int) -> int:
    return SIGNALLED - code if code < 0 else code


def say(text: str) -> None:
    """One line of `supervise`."""
    sys.stderr.write(f"supervise  {text}\n")
    sys.stderr.flush()
