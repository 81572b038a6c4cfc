"""`ProcessIdentity`: names one process for good. Its number alone does not: it is used again after the process has ended, after a
boot, and in every container, where the first process is always number 1. Imports no torch.
"""

import contextlib
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

BOOT_ID, PID_NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
SAME_START = 0.02 if sys.platform == "linux" else 2.0
"""Seconds by which two readings of a process's start may differ. Linux counts hundredths of a second from the boot; a restarted
container has the old one's namespace and pid, and starts a second later. Elsewhere, the time of the boot is corrected now and then."""


@dataclass(frozen=True)
class ProcessIdentity:
    """One process. `asdict` of it is JSON data, which `from_json` reads back."""

    host: str
    pid: int
    boot_id: str
    """Drawn by the kernel at each boot; '' where there is none (macOS)."""
    pid_namespace: str
    """The numbering that `pid` belongs to: each container has its own. '' where there are no namespaces."""
    started_after_boot: float
    """Seconds from the boot of the machine to the start of the process; setting the clock does not change it."""

    @classmethod
    def current(cls) -> "ProcessIdentity":
        """This process."""
        return cls.of(psutil.Process())

    @classmethod
    def of(cls, process: psutil.Process) -> "ProcessIdentity":
        """A process that can be seen from here. Raises psutil.NoSuchProcess if it has ended."""
        boot_id = pid_namespace = ""
        with contextlib.suppress(FileNotFoundError, PermissionError):  # another error, of a moment, must not make it another machine
            boot_id, pid_namespace = BOOT_ID.read_text().strip(), os.readlink(PID_NAMESPACE)
        booted, started = psutil.boot_time(), process.create_time()
        if psutil.boot_time() != booted:  # the clock was set in between
            return cls.of(psutil.Process(process.pid))
        return cls(socket.gethostname(), process.pid, boot_id, pid_namespace, started - booted)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ProcessIdentity | None":
        """The process that these values name, among others; None if they do not name one. Older files have its host and pid only."""
        try:
            host, pid, boot_id, pid_namespace = values["host"], values["pid"], values["boot_id"], values["pid_namespace"]
            number = int(pid)
            if not 0 < number < 2**31:  # the file may come from a stranger
                return None
            return cls(str(host), number, str(boot_id), str(pid_namespace), float(values["started_after_boot"]))
        except (KeyError, TypeError, ValueError, OverflowError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def same_machine(self, other: "ProcessIdentity") -> bool:
        """Whether the two can see each other: one boot and one numbering of processes; where the system has neither, one host."""
        return (self.boot_id or self.host, self.pid_namespace) == (other.boot_id or other.host, other.pid_namespace)

    def is_same(self, other: "ProcessIdentity") -> bool:
        """Whether the two name one process. Two readings of its start may differ by a little."""
        same_start = abs(self.started_after_boot - other.started_after_boot) < SAME_START
        return self.same_machine(other) and self.pid == other.pid and same_start

    def find(self) -> psutil.Process | None:
        """The living process; None if it has ended, whoever has its number now, or cannot be seen from here.

        A zombie has ended: only its parent has not read its exit code yet.
        """
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            found = self.of(process)
            return process if self.is_same(found) and process.status() != psutil.STATUS_ZOMBIE else None
        return None

    def is_alive(self) -> bool | None:
        """Whether it still runs; None if this cannot be known here: on another machine, in another container, for a hidden process."""
        if not self.same_machine(self.current()):
            return None
        if self.find():
            return True
        return None if _is_hidden(self.pid) else False


def _is_hidden(pid: int) -> bool:
    """Whether there is a process with this number of which the system shows nothing else: another user's (hidepid)."""
    try:
        psutil.Process(pid)
    except psutil.NoSuchProcess:
        return psutil.pid_exists(pid)
    return False
