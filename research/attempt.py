"""One launch as a child of this process: signals go on to all of it, and when it is over nothing of it is left."""

import contextlib
import os
import signal
import subprocess
import time
from types import FrameType

import psutil

from research import kernel
from research.signals import catch

GRACE_SECONDS = 60.0
"""After the launcher's end its ranks may still be saving: so long, then they are killed."""


class Launches:
    """Starts launches, one at a time, and passes signals on. One for a process, on its main thread."""

    def __init__(self) -> None:
        """From now on this process outlives SIGINT, SIGTERM, SIGUSR1 and SIGHUP."""
        self.signal = 0
        """The first that has come; 0: none."""
        self._child: subprocess.Popen[bytes] | None = None
        kernel.adopt_orphans()
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
    kernel.tell_of_parents_death(signal.SIGTERM)


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
