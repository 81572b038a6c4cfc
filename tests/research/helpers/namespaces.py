"""Hosts made of namespaces: each has a host name, processes, and a network of its own, and all see the same disk.

A process of one host cannot be seen or signalled from another one, as on two machines; only the kernel, and so its flock and its boot,
is the same. An agent, process 1 of the host, starts and signals the host's processes.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from research import ROOT

UNSHARE = ["unshare", "--user", "--map-root-user", "--uts", "--pid", "--net", "--mount", "--fork", "--mount-proc", "--kill-child"]


def can_make_hosts() -> bool:
    """Whether this user may make such namespaces here."""
    try:
        return subprocess.run([*UNSHARE, "hostname", "probe"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class Host:
    """One host. Leaving the `with` block kills all of its processes."""

    def __init__(self, name: str) -> None:
        self.name = name
        start = 'hostname "$0" && ip link set lo up 2>/dev/null; exec "$@"'
        command = [*UNSHARE, "sh", "-c", start, name, sys.executable, "-m", "tests.research.helpers.namespaces"]
        self._agent = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self, command: list[str], output: Path, environ: dict[str, str] | None = None) -> int:
        """Starts a process whose output goes to the file; returns its number on this host."""
        return self._ask(start=command, output=str(output), environ=environ or {})

    def signal(self, pid: int, number: int) -> None:
        self._ask(signal=[pid, int(number)])

    def wait(self, pid: int, seconds: float) -> int | None:
        """The exit code of a process; None if it still runs after so many seconds."""
        return self._ask(wait=pid, seconds=seconds)

    def _ask(self, **request: Any) -> Any:
        assert self._agent.stdin and self._agent.stdout
        self._agent.stdin.write(json.dumps(request) + "\n")
        self._agent.stdin.flush()
        return json.loads(self._agent.stdout.readline())

    def __enter__(self) -> "Host":
        return self

    def __exit__(self, *_: object) -> None:
        self._agent.kill()
        self._agent.wait()


def serve() -> None:
    """What the agent does: one request a line, one answer a line."""
    processes: dict[int, subprocess.Popen[bytes]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        if "start" in request:
            with open(request["output"], "ab") as output:
                process = subprocess.Popen(
                    request["start"], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **request["environ"]}
                )
            processes[process.pid] = process
            answer = process.pid
        elif "signal" in request:
            pid, number = request["signal"]
            if processes[pid].poll() is None:
                processes[pid].send_signal(signal.Signals(number))
        else:
            try:
                answer = processes[request["wait"]].wait(request["seconds"])
            except subprocess.TimeoutExpired:
                answer = None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
