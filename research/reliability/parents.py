"""A rank does not outlive its launcher: the death of a launcher's process above it is a SIGTERM to the rank.

DeepSpeed's launch.py leaves its ranks behind when it is killed, and the `deepspeed` command leaves launch.py behind, which then
lives on with all ranks. The kernel tells of the first at once (Linux); of the second, and of the first elsewhere, a thread
finds out within a second. A process that srun or a shell started is left alone: a shell may end long before it.
"""
# MERGED-DOC """Two requests to Linux about processes whose parent dies. Elsewhere they are not granted."""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def tell_of_parents_death(number: int) -> None:
    """This process gets the signal when its parent dies, whatever it is then busy with; by default it ends at once."""
    _prctl(PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Whoever below this process loses its parent becomes this process's child, so that it can be found."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


NAMES = {"deepspeed": r"deepspeed\.launcher|(^|/)(deepspeed|deepspeed\.pt|ds)$", "torchrun": r"torch\.distributed|(^|/)torchrun$"}
"""Of each launcher's processes: the program, or the script or module that Python or a shell runs."""
LEVELS = {"deepspeed": 2, "torchrun": 1}
"""How many of them are above a rank: launch.py, and above it the `deepspeed` command (on another machine: the shell that it opened)."""
LOOK_SECONDS = 1.0
LAUNCHER_GONE = "SIGTERM, for the launcher is gone"
"""Why a run ends that nobody has asked to."""


class Parents:
    """The launcher's processes above this one. When one of them has died, `gone` is true and SIGTERM is on its way."""

    def __init__(self, launcher: str) -> None:
        """Looks up who they are; none are followed where the launcher is none that leaves ranks behind."""
        name, levels = NAMES.get(launcher), LEVELS.get(launcher, 0)
        self.above = _named(name)[:levels] if name else []
        self.gone = bool(name) and len(self.above) < levels and _adopted(self.above[-1] if self.above else psutil.Process())

    def follow(self) -> None:
        """From now on their death is a SIGTERM to this process, which ends it at once unless it catches the signal."""
        if self.above:
            tell_of_parents_death(signal.SIGTERM)
        if self.above or self.gone:
            threading.Thread(target=self._look, name="parents", daemon=True).start()

    def _look(self) -> None:
        pause = threading.Event()
        while not self.look():
            pause.wait(LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    def look(self) -> bool:
        """Whether one of them has died, so that somebody else is now the parent of the one below it."""
        below = psutil.Process()
        for process in self.above:
            self.gone = self.gone or _parent_of(below) != process.pid
            below = process
        return self.gone


def follow(launcher: str) -> Parents:
    """Follows the launcher's processes that are above this one."""
    parents = Parents(launcher)
    parents.follow()
    return parents


def _named(name: str) -> list[psutil.Process]:
    """The nearest ancestors, up to the first that has another name."""
    found = []
    with contextlib.suppress(psutil.Error, ValueError):
        for parent in psutil.Process().parents():
            program, *words = parent.cmdline()
            script = next((word for word in words if not word.startswith("-")), "")
            if not (re.search(name, program) or re.search(name, script)):
                break
            found.append(parent)
    return found


def _parent_of(process: psutil.Process) -> int:
    """The pid of its parent; 0 where the process is gone itself."""
    with contextlib.suppress(psutil.Error):
        return process.ppid()
    return 0


def _adopted(process: psutil.Process) -> bool:
    """Whether its parent died before anybody looked: the new one belongs to a session that the process never left.

    A process that has begun a session of its own, as torchrun's do, is known to be adopted by process 1 only.
    """
    try:
        parent, session = process.ppid(), os.getsid(process.pid)
        return parent == 1 if session == process.pid else parent > 0 and os.getsid(parent) != session
    except (OSError, psutil.Error):
        return True
