"""Real servers for tests: one in this process, on a port of its own, whose engine runs in a thread; and one as it is typed."""

import contextlib
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from research.cli.serve import checked_task, parser
from research.serving import server
from research.serving.server import Running
from research.tracking.run_folder import RunFolder
from tests.research.helpers.launches import ROOT

PATIENCE = 120.0
"""Seconds after which a test has failed, not passed slowly."""


@dataclass(frozen=True)
class Served:
    """A server and how to reach it."""

    url: str
    running: Running
    thread: threading.Thread

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, **settings) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE, **settings)

    def post(self, path: str, **value) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=value)

    def number(self, name: str) -> float:
        """A metric of /metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=PATIENCE) as answer:
            return number(answer.read().decode(), name)


def number(metrics: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", metrics, re.MULTILINE)
    return float(found[1]) if found else 0.0


@contextlib.contextmanager
def served(folder: RunFolder, *words: str) -> Iterator[Served]:
    """A server in this process, to which one can connect at once; at the end its thread is gone."""
    task = checked_task(parser().parse_args([str(folder.path), "--port", "0", *words]))
    begun, failed = threading.Event(), []
    found: list[Running] = []

    def live() -> None:
        try:
            with server.make_server(task.spec(), print) as running:
                found.append(running)
                begun.set()
                running.run()
        except BaseException as error:
            failed.append(error)
            begun.set()

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    assert begun.wait(PATIENCE)
    if failed:
        raise failed[0]
    try:
        yield Served(task.address, found[0], thread)
    finally:
        found[0].stop()
        found[0].stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()
    if failed:
        raise failed[0]


def until(what, seconds: float = PATIENCE) -> None:
    """Waits until `what()` is true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


@contextlib.contextmanager
def typed(run: str, *words: str) -> Iterator[tuple[subprocess.Popen, str, list[str]]]:
    """`python -m research serve RUN`: (the process, its address, its first lines). Once the address is printed, one can connect."""
    command = [sys.executable, "-m", "research", "serve", run, "--port", "0", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        lines = []
        while not lines or not lines[-1].startswith("try "):
            lines.append(process.stdout.readline())
            assert lines[-1], "".join(lines)
        url = next(re.search(r"http://\S+:\d+", line)[0] for line in lines if line.startswith("address"))
        yield process, url, lines
    finally:
        process.kill()
        process.wait()
