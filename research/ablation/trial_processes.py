"""Runs several launches at a time as child processes. Signals are passed on to all of them, and none is left behind."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from research.cluster.environment import FIRST_PORT, PORTS, environment
from research.reliability.parents import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, prctl
from research.reliability.signals import catch
from research.reliability.supervisor import GRACE_SECONDS, descendants

POLL_SECONDS = 0.2


class Processes:
    """Launches that run at the same time. One per process, on its main thread."""

    def __init__(self) -> None:
        """From now on SIGINT, SIGTERM, SIGUSR1 and SIGHUP do not end this process."""
        self.signal = 0
        """The first signal received; 0: none."""
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._logs: dict[int, IO[bytes]] = {}
        prctl(PR_SET_CHILD_SUBREAPER, 1)  # so that processes that a launch leaves behind can be found
        catch(self._receive)

    def __len__(self) -> int:
        return len(self._running)

    def start(self, key: int, command: Sequence[str], log: Path | None, changes: Mapping[str, str]) -> None:
        """Starts a launch in a session of its own, with changes of the environment. `log` None: its output is this process's.

        It gets SIGTERM if this process is killed.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(environment(changes))
            output = None
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                output = self._logs[key] = open(log, "ab")  # noqa: SIM115
            self._running[key] = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
                preexec_fn=functools.partial(prctl, PR_SET_PDEATHSIG, signal.SIGTERM),
            )
        if self.signal:  # received while the process was being made
            self._pass_on(self.signal)

    def wait(self) -> tuple[int, int]:
        """Waits until one of the launches has ended: (its key, its exit code). −n: ended by signal n."""
        while True:
            for key, process in self._running.items():
                code = process.poll()
                if code is not None:
                    del self._running[key]
                    if key in self._logs:
                        self._logs.pop(key).close()
                    if not self._running:
                        self._clear()
                    return key, code
            time.sleep(POLL_SECONDS)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)

    def _clear(self) -> None:
        """Waits for processes that launches have left behind, then kills them: this process's descendants, and no others."""
        ends = time.monotonic() + GRACE_SECONDS
        while left := descendants():
            if time.monotonic() > ends:
                for process in left:
                    with contextlib.suppress(Exception):
                        process.kill()
            time.sleep(POLL_SECONDS)
            with contextlib.suppress(ChildProcessError):  # read adopted processes' exit codes, so that they do not stay as zombies
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def free_port(number: int) -> int:
    """A port on which nobody listens; different numbers begin to look at different places, as several launches begin at once."""
    start = FIRST_PORT + number * 97 % PORTS
    for port in range(start, start + PORTS):
        port = FIRST_PORT + (port - FIRST_PORT) % PORTS
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    return start
