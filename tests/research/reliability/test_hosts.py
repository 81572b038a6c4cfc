"""Which hosts `supervise --shrink` goes on with, and how the batch is then made. The launches themselves: end_to_end/test_shrink.py."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from parallel.errors import Mistake
from parallel.files import write_json
from research.cluster.hostfile import Host
from research.cluster.remote import MARK, UNREACHED, Remote
from research.reliability import hosts, supervisor
from research.reliability.hosts import Choice, HostLauncher, Shape, choose
from research.reliability.signals import SIGNALS
from research.reliability.supervisor import Launcher, LaunchRecord, supervise
from research.tracking.lock_record import beating
from research.tracking.run_folder import RunFolder

FOUR = [Host(f"node{number}", 2) for number in range(1, 5)]


def named(*numbers: int) -> list[Host]:
    return [FOUR[number - 1] for number in numbers]


@pytest.mark.parametrize(
    ("answering", "shape", "expected"),
    [
        # pipe, tensor, batch, micro                             hosts, data ranks, micro, accumulated
        (named(1, 2, 4), Shape(1, 1, 24, 1), Choice(named(1, 2, 4), 6, 1, 4)),
        (named(2, 3, 4), Shape(1, 1, 16, 2), Choice(named(2, 3), 4, 2, 2)),  # 6 data ranks do not divide 16
        (named(1, 3, 4), Shape(1, 2, 24, 4), Choice(named(1, 3, 4), 3, 4, 2)),
        (named(1, 2, 3), Shape(1, 1, 24, 3), Choice(named(1, 2, 3), 6, 2, 2)),  # 24 / 6 = 4 is no multiple of 3: micro-batches of 2
        (named(1, 2, 3), Shape(1, 1, 42, 4), Choice(named(1, 2, 3), 6, 1, 7)),  # 7 is a prime
        (named(1, 2, 3), Shape(2, 2, 8, 2), Choice(named(1, 2), 1, 2, 4)),  # 6 ranks are no multiple of 4
        (named(3), Shape(1, 1, 8, 2), Choice(named(3), 2, 2, 2)),
        (named(3), Shape(2, 2, 8, 2), None),  # 2 ranks cannot hold 4 slices
        ([], Shape(1, 1, 8, 2), None),
        ([Host("a", 4), Host("b", 2), Host("c", 4)], Shape(1, 1, 16, 1), Choice([Host("a", 4), Host("c", 4)], 8, 1, 2)),  # not 6, not 10
        ([Host("a", 2), Host("b", 8)], Shape(1, 8, 8, 8), Choice([Host("b", 8)], 1, 8, 1)),
    ],
)
def test_the_choice(answering: list[Host], shape: Shape, expected: Choice | None) -> None:
    assert choose(answering, shape) == expected


@pytest.mark.parametrize(("pipe", "tensor"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_the_choice_is_the_best_of_all(pipe: int, tensor: int) -> None:
    """Against all subsets of the hosts, one after the other; the arithmetic of the batch is what a launch checks."""
    for slots in itertools.product((1, 2, 3), repeat=4):
        hosts = [Host(f"node{i}", slot) for i, slot in enumerate(slots)]
        for batch, micro in ((12, 2), (16, 4), (7, 1)):
            subsets = [subset for size in range(1, 5) for subset in itertools.combinations(hosts, size)]
            sizes = [(len(subset), sum(host.slots for host in subset)) for subset in subsets]
            fitting = [size for size in sizes if size[1] % (pipe * tensor) == 0 and batch % (size[1] // (pipe * tensor)) == 0]
            found = choose(hosts, Shape(pipe, tensor, batch, micro))
            if found is None:
                assert not fitting
                continue
            assert (len(found.hosts), sum(host.slots for host in found.hosts)) == max(fitting)
            assert found.micro_batch_size * found.accumulated * found.data == batch and found.micro_batch_size <= micro


@pytest.mark.parametrize(
    ("command", "alone", "expected"),
    [
        ("deepspeed --hostfile hosts x.py", False, "deepspeed --hostfile NEW x.py"),
        ("deepspeed -H hosts --quiet x.py", False, "deepspeed -H NEW --quiet x.py"),
        ("deepspeed --quiet --hostfile=hosts x.py", True, "deepspeed --quiet --hostfile=NEW --force_multi x.py"),
        ("deepspeed --force_multi --hostfile hosts x.py", True, "deepspeed --force_multi --hostfile NEW x.py"),
    ],
)
def test_the_command_gets_the_chosen_hosts(command: str, alone: bool, expected: str, tmp_path) -> None:
    """On one host, without --force_multi, DeepSpeed would start the ranks where `supervise` runs, which may be another host."""
    launcher = HostLauncher(command.split(), FOUR, Shape(1, 1, 8, 1), tmp_path, shrink=True, port=None)
    assert launcher._with_hostfile("NEW", alone) == expected.split()


def test_a_rank_that_still_writes_heartbeats_is_noticed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.logs.mkdir()
    folder.heartbeat(0).write_text("1")
    folder.heartbeat(1).write_text("1")
    assert not beating([folder.lock], 0.2)
    remove = threading.Timer(0.05, folder.heartbeat(0).unlink)
    remove.start()
    assert not beating([folder.lock], 0.2), "a rank that ends removes its file"
    beat = threading.Timer(0.05, lambda: folder.heartbeat(1).write_text("2"))
    beat.start()
    assert beating([folder.lock], 5)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`supervise` runs here: its handlers of signals are taken back, and it waits for tenths of seconds."""
    monkeypatch.setattr(supervisor, "prctl", lambda *arguments: 0)
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.0)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_it_listens_for_a_run_that_has_no_checkpoint_yet(tmp_path: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host was cut off before the first checkpoint. Its ranks go on, so nothing is launched beside them."""
    monkeypatch.setattr(hosts, "SILENT_SECONDS", 2.0)
    folder, asked = RunFolder(tmp_path / "gpt" / "aaaaaa"), list[tuple[list[str], RunFolder | None]]()
    folder.logs.mkdir(parents=True)

    class CutOff:
        def run(self, launcher: Launcher, settings: Sequence[str], last: RunFolder | None) -> int:
            asked.append(([*settings], last))
            write_json(folder.run, {"status": "running", "launch": len(asked)})
            return 1

    supervise([], ["--seed", "3"], LaunchRecord(folder.path.parent, lambda run: True), 1, CutOff())
    assert asked == [(["--seed", "3"], None), (["--seed", "3"], folder)]

    launcher = HostLauncher(["deepspeed", "x.py"], FOUR, Shape(1, 1, 8, 1), tmp_path, shrink=True, port=None)
    launcher._launched = True
    assert not launcher._is_still_running(folder, {}) and not launcher._is_still_running(None, {"node2": "no answer"})
    beats = threading.Timer(0.2, lambda: folder.heartbeat(1).write_text("1"))
    beats.start()
    assert launcher._is_still_running(folder, {"node2": "no answer"})


class Here(Remote):
    """Runs what it would run over ssh on this host, as a host of any name. `kills`: whether kill -9 works there."""

    def __init__(self, kills: bool) -> None:
        super().__init__()
        self.kills = kills

    def _run(self, host: str, command: str) -> tuple[int, str, str]:
        if "kill -9" in command and not self.kills:
            return UNREACHED, "", ""
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def left_behind(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(mark, process) of a launch that does not end by itself."""
    mark = f"test-{os.getpid()}-{tmp_path.name}"
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={**os.environ, MARK: mark}) as process:
        yield mark, process
        process.kill()


def launcher_on(remote: Remote, folder: Path) -> HostLauncher:
    launcher = HostLauncher(["deepspeed", "x.py"], FOUR, Shape(1, 1, 8, 1), folder, shrink=True, port=None)
    launcher._remote = remote
    return launcher


def test_it_gives_up_on_processes_that_cannot_be_killed(tmp_path: Path, left_behind: Any, in_this_process: None, monkeypatch) -> None:
    """They would go on beside the next launch, and without an end to the wait nobody would be told."""
    monkeypatch.setattr(hosts, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(hosts, "KILL_SECONDS", 0.5)
    mark, process = left_behind
    with pytest.raises(Mistake, match=f"cannot be killed: node1 {process.pid} → end it there, then start again with --resume auto"):
        launcher_on(Here(kills=False), tmp_path)._wait_until_gone(Launcher(), ["node1"], mark)


@pytest.mark.slow
def test_a_signal_ends_the_wait_for_processes_that_are_left(tmp_path: Path, left_behind: Any, in_this_process: None) -> None:
    mark, process = left_behind
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    launcher_on(Here(kills=True), tmp_path)._wait_until_gone(Launcher(), ["node1"], mark)
    assert process.wait(10) == -signal.SIGKILL and time.monotonic() - began < hosts.GRACE_SECONDS
