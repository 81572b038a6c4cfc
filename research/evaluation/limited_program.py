"""Executes Python programs that a model has written, each in a process of its own with limits, several at a time. Linux only.

    for number, outcome in run_programs(programs, Limits()):
        print(number, outcome.passed, outcome.said)

A program gets an interpreter of its own with the standard library alone, an environment of one variable (`PYTHONHASHSEED=0`, so that the
order of a set is the same each time), an empty temporary folder as its working directory, and /dev/null as its standard streams. It may
use so much CPU time, so much time by the clock, so much memory and 64 open files, and write no byte to a file. Where the kernel has the
means, it can also neither open, make or remove a file for writing (Landlock), nor start a process, make a socket, signal another process
or change a file's mode (seccomp). When it has ended, nothing that it has started is left: `limited_child.py` does all of this.

**This is not a security boundary.** A program may read what its user may read, and one that is written to deceive can pretend to pass.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import Mistake

CHILD = Path(__file__).with_name("limited_child.py")
RESTRICTIONS = {
    "files": "opening, making and removing files (Landlock)",
    "processes": "processes, sockets, signals and modes of files (seccomp)",
}
"""What only some kernels can refuse a program -> what it is, and what refuses it."""
PATIENCE = 4
"""How many times its CPU seconds a program may take by the clock: it may wait for a core, but not for ever."""
GRACE_SECONDS = 10.0
"""How much longer the process that keeps the time may take to end."""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    cpu_seconds: int = 5
    memory: int = 2**30
    """Bytes of address space, those of the interpreter included."""
    wall_seconds: float | None = None
    """Seconds by the clock; None: PATIENCE times the CPU seconds."""
    restrictions: tuple[str, ...] = tuple(RESTRICTIONS)
    """Those that the kernel is asked for."""

    def request(self, program: str) -> bytes:
        """What limited_child.py reads."""
        wall_seconds = PATIENCE * self.cpu_seconds if self.wall_seconds is None else self.wall_seconds
        how = {"cpu_seconds": self.cpu_seconds, "wall_seconds": wall_seconds, "memory": self.memory}
        return json.dumps({"program": program, **how, "restrictions": self.restrictions}).encode()


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    passed: bool
    """Whether it was executed to its end without an error. Its exit code and its output do not count."""
    timed_out: bool
    said: str
    """The name of the error that ended it, or how it ended otherwise; "" if it has passed."""
    restrictions: tuple[str, ...]
    """Those that were in effect."""


def check_system() -> None:
    """Raises a Mistake where there are no such limits."""
    if sys.platform != "linux":
        raise Mistake(f"generated code runs under limits of Linux, and this is {sys.platform} → evaluate it on Linux")


def run_programs(programs: Sequence[str], limits: Limits, at_once: int | None = None) -> Generator[tuple[int, Outcome], None, None]:
    """Yields (index, outcome) of each program as it ends. `at_once` None: as many at a time as this process may use cores.

    If the iteration is ended early, the programs that run are ended too.
    """
    at_once = at_once or len(os.sched_getaffinity(0))
    waiting, running = iter(enumerate(programs)), set[_Running]()
    with selectors.DefaultSelector() as selector:
        try:
            while True:
                while len(running) < at_once and (job := next(waiting, None)) is not None:
                    started = _Running(*job, limits)
                    running.add(started)
                    selector.register(started.output, selectors.EVENT_READ, started)
                if not running:
                    return
                earliest = min(program.deadline for program in running)
                ready = [key.data for key, _ in selector.select(max(0.0, earliest - time.monotonic()))]
                for program in {*ready, *(program for program in running if program.is_late)}:
                    selector.unregister(program.output)
                    outcome = program.outcome()
                    running.remove(program)
                    yield program.index, outcome
        finally:
            for program in running:
                program.end()


class _Running:
    """A program that is being executed."""

    def __init__(self, index: int, program: str, limits: Limits) -> None:
        request = limits.request(program)
        self.index, self.folder = index, tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True)
        self.deadline = time.monotonic() + json.loads(request)["wall_seconds"] + GRACE_SECONDS
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-B", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self.folder.name,
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.output = self.process.stdout
        with contextlib.suppress(BrokenPipeError), self.process.stdin as stream:  # of a process that has failed, there is no outcome
            stream.write(request)

    @property
    def is_late(self) -> bool:
        """Whether the process has not ended in the time that it had to end the program."""
        return time.monotonic() >= self.deadline

    def outcome(self) -> Outcome:
        """The outcome, when there is output or the process is late."""
        try:
            found: dict[str, Any] = {} if self.is_late else json.loads(self.output.read())
        except ValueError:
            found = {}
        self.end()
        if not found:
            return Outcome(False, False, "the process that limits the program has failed", ())
        return Outcome(found["passed"], found["timed_out"], found["said"], tuple(found["restrictions"]))

    def end(self) -> None:
        """Ends the process, after it has ended the program, and removes the folder."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.output.close()
        self.folder.cleanup()
