"""Ends a rank when its launcher dies: the death of one of the launcher's processes above a rank is a SIGTERM to the rank.

DeepSpeed's launch.py leaves its ranks running when it is killed, and the `deepspeed` command leaves launch.py running with all
ranks. On Linux the kernel signals the first case at once; the second, and the first elsewhere, a thread detects within a second.
On another host, what started launch.py is no `deepspeed` command but a remote shell's server, whatever its name (sshd's process for one
connection, which ends when the connection does). There launch.py, or the shell around it, leads a session: its parent is followed.
A process that srun or a shell started is left alone: a shell may end long before its child.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
from pathlib import Path

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Options of `prctl`: the signal that this process gets when its parent dies; whether orphaned descendants become its children."""
NAMES = {"deepspeed": r"deepspeed\.launcher|(^|/)(deepspeed|deepspeed\.pt|ds)$", "torchrun": r"torch\.distributed|(^|/)torchrun$"}
"""Matches each launcher's processes: the program, or the script or module that Python or a shell runs."""
LEVELS = {"deepspeed": 2, "torchrun": 1}
"""How many of them are above a rank: launch.py, and above it the `deepspeed` command (on another host: the shell that it opened)."""
COMMAND = {"deepspeed": r"deepspeed\.launcher\.runner|^(\S*/)?(deepspeed|deepspeed\.pt|ds)$"}
"""Matches the command that a user types. Its own parent, a shell, may end at any time."""
CHECK_SECONDS = 1.0
LAUNCHER_GONE = "SIGTERM, for the launcher is gone"
"""The reason in run.json of a run that ended because its launcher died."""


def prctl(option: int, value: int) -> None:
    """Sets an option of this process, on Linux; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class Parents:
    """The launcher's processes above this one; `gone` becomes true when one of them has died."""

    def __init__(self, launcher: str) -> None:
        """Finds the processes; there are none for a launcher that does not leave ranks behind."""
        name, levels = NAMES.get(launcher), LEVELS.get(launcher, 0)
        self.above = _ancestors(name)[:levels] if name else []
        self.gone = bool(name) and len(self.above) < levels and _is_orphan(self.above[-1] if self.above else psutil.Process())
        if self.above and not self.gone and (server := _remote_shell(self.above[-1], COMMAND.get(launcher))):
            self.above.append(server)

    def check(self) -> bool:
        """Whether one of them has died, in which case the process below it has another parent now."""
        child = psutil.Process()
        for process in self.above:
            parent = 0  # if the child is gone itself
            with contextlib.suppress(psutil.Error):
                parent = child.ppid()
            self.gone = self.gone or parent != process.pid
            child = process
        return self.gone


def follow(launcher: str) -> Parents:
    """From now on the death of one of the launcher's processes is a SIGTERM to this one, which ends it unless it handles the signal."""
    parents = Parents(launcher)

    def watch() -> None:
        pause = threading.Event()
        while not parents.check():
            pause.wait(CHECK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    if parents.above:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if parents.above or parents.gone:
        threading.Thread(target=watch, name="parents", daemon=True).start()
    return parents


def _ancestors(name: str) -> list[psutil.Process]:
    """The nearest ancestors of this process whose name matches, up to the first that does not match."""
    ancestors = []
    with contextlib.suppress(psutil.Error, ValueError):
        for parent in psutil.Process().parents():
            if not _matches(name, parent):
                break
            ancestors.append(parent)
    return ancestors


def _matches(name: str, process: psutil.Process) -> bool:
    """Whether the pattern is found in the program, or in the script or module that it runs."""
    program, *arguments = process.cmdline()
    script = next((argument for argument in arguments if not argument.startswith("-")), "")
    return bool(re.search(name, program) or re.search(name, script))


def _remote_shell(top: psutil.Process, command: str | None) -> psutil.Process | None:
    """The parent of `top`, the launcher's uppermost process, if that was started from another host: not by the command, in its own session.

    None if `top` is the command, if `command` is None, or if the parent cannot be followed: process 1 adopts orphans.
    """
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        if command is None or _matches(command, top) or os.getsid(top.pid) != top.pid:
            return None
        parent = top.parent()
        return parent if parent is not None and parent.pid > 1 else None
    return None


def _is_orphan(process: psutil.Process) -> bool:
    """Whether its parent died before this was called: the parent it has now belongs to a session that the process was never in.

    A process that has begun a session of its own, as torchrun's do, is recognised as an orphan only if process 1 adopted it. In a
    container, process 1 may be a launcher with a name that we do not know: if it runs Python, the process is not taken for an orphan.
    """
    try:
        parent, session = process.ppid(), os.getsid(process.pid)
        if session != process.pid:
            return parent > 0 and os.getsid(parent) != session
    except (OSError, psutil.Error):
        return True
    return parent == 1 and not _runs_python(1)


def _runs_python(pid: int) -> bool:
    """Whether the process is a Python program; False if that cannot be read."""
    with contextlib.suppress(psutil.Error, IndexError):
        return Path(psutil.Process(pid).cmdline()[0]).name.startswith("python")
    return False
