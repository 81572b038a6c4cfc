"""Reaches the hosts of a hostfile by ssh: which of them answer, and which processes of a launch are still there. Imports no torch.

The processes of a launch are recognised by a variable in their environment, `MARK`. DeepSpeed takes it to all hosts, because its name
begins with PYTHON. It is read in /proc, so the hosts must run Linux.
"""

import shlex
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")
MARK = "PYTHON_TESSERA_LAUNCH"
"""The environment variable that all processes of a launch have. Python itself does not read it."""
ANSWER_SECONDS = 10.0
"""A host that takes longer to answer is taken for dead."""
AT_ONCE = 64
"""Hosts that are asked at the same time."""
UNREACHED = 255
"""The exit code of ssh itself, when the command was not run."""
FIND = "grep -lsxz -e {mark} /proc/[0-9]*/environ"
KILL = "for file in $({find}); do number=${{file%/environ}}; kill -9 ${{number#/proc/}}; done"


class Remote:
    """Runs commands on hosts, on all at once."""

    def __init__(self, port: int | None = None, seconds: float = ANSWER_SECONDS) -> None:
        """`port` is that of the hosts' sshd; None: what ssh's configuration says. `seconds` is how long a host may take."""
        self._port, self._seconds = port, seconds

    def silent(self, hosts: Sequence[str], folder: Path) -> dict[str, str]:
        """The hosts on which nothing can be started, and why: they do not answer in time, or they have no `folder`."""
        return {host: reason for host, reason in self._on_all(hosts, lambda host: self._why_not(host, folder)).items() if reason}

    def processes(self, hosts: Sequence[str], mark: str) -> dict[str, list[int]]:
        """The processes of the launch with this mark that are alive, by host. A host that does not answer is left out."""
        return {host: found for host, found in self._on_all(hosts, lambda host: self._marked(host, mark)).items() if found is not None}

    def kill(self, hosts: Sequence[str], mark: str) -> None:
        """Kills the processes of the launch with this mark on these hosts."""
        command = KILL.format(find=FIND.format(mark=shlex.quote(f"{MARK}={mark}")))
        self._on_all(hosts, lambda host: self._run(host, f"sh -c {shlex.quote(command)}"))

    def _why_not(self, host: str, folder: Path) -> str:
        code, _, error = self._run(host, f"test -d {shlex.quote(str(folder))}")
        if code == UNREACHED:
            return error.strip().splitlines()[-1] if error.strip() else "ssh gives no reason"
        return f"it has no folder {folder}" if code else ""

    def _marked(self, host: str, mark: str) -> list[int] | None:
        """The numbers of the processes; None if the host does not answer."""
        find = FIND.format(mark=shlex.quote(f"{MARK}={mark}"))
        code, out, _ = self._run(host, f"sh -c {shlex.quote(find)}")  # 1: none found; 2: those of other users cannot be read
        return None if code == UNREACHED else [int(Path(line).parent.name) for line in out.split()]

    def _run(self, host: str, command: str) -> tuple[int, str, str]:
        """(exit code, standard output, standard error) of a command on a host; UNREACHED also if it takes too long."""
        wait = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, round(self._seconds))}"]
        port = ["-p", str(self._port)] if self._port else []
        words = ["ssh", *wait, *port, host, command]
        try:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=2 * self._seconds)
        except subprocess.TimeoutExpired:
            return UNREACHED, "", f"no answer within {2 * self._seconds:.0f} s"
        except FileNotFoundError:
            return UNREACHED, "", "there is no program ssh here"
        return done.returncode, done.stdout, done.stderr

    def _on_all(self, hosts: Sequence[str], run: Callable[[str], Result]) -> dict[str, Result]:
        with ThreadPoolExecutor(max_workers=min(AT_ONCE, max(1, len(hosts)))) as threads:
            return dict(zip(hosts, threads.map(run, hosts), strict=True))
