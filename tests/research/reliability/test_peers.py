"""A rank's process is known by more than its number."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from parallel import process_identity
from parallel.process_identity import ProcessIdentity
from research.reliability.heartbeat import Progress
from research.reliability.peers import Neighbours, Peer, PeerMonitor, all_peers
from research.tracking.run_folder import RunFolder
from tests.harness import run_ranks


def this_process() -> Peer:
    return Peer(0, ProcessIdentity.current())


@pytest.fixture
def other() -> Iterator[Peer]:
    """A process that sleeps, as rank 1 of this machine."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    yield Peer(1, ProcessIdentity.of(psutil.Process(process.pid)))
    process.kill()
    process.wait()


def test_a_rank_that_has_ended_is_gone_before_anybody_asks_for_its_exit_code(other: Peer) -> None:
    neighbours = Neighbours([this_process(), other], 0)
    assert neighbours.gone() == set()
    assert neighbours.kill(1)
    os.waitid(os.P_PID, other.process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert neighbours.gone() == {1}


def test_a_process_that_has_inherited_the_number_is_left_alone(other: Peer) -> None:
    earlier = replace(other.process, started_after_boot=other.process.started_after_boot - 3600)
    neighbours = Neighbours([this_process(), replace(other, process=earlier)], 0)
    assert neighbours.gone() == set() and not neighbours.kill(1)
    assert psutil.Process(other.process.pid).is_running()


def test_another_machines_process_is_left_alone(other: Peer) -> None:
    neighbours = Neighbours([this_process(), replace(other, process=replace(other.process, boot_id="another"))], 0)
    assert not neighbours.kill(1) and not neighbours.kill(0)
    os.kill(other.process.pid, signal.SIGKILL)
    assert neighbours.gone() == set()


def who() -> list[Peer]:
    from torch import distributed

    return all_peers(distributed.get_rank(), distributed.get_world_size())


def test_all_ranks_know_all() -> None:
    first, second = run_ranks(who, 2)
    assert first == second and [peer.rank for peer in first] == [0, 1]
    assert first[0].process != first[1].process
    assert all(peer.process.same_machine(ProcessIdentity.current()) for peer in first)


def a_host_that_falls_silent(path: Path) -> list[list[int]]:
    """What rank 0 says of rank 1, which is on another machine: while it gives signs of life, and afterwards."""
    rank = dist.get_rank()
    (path / f"boot_{rank}").write_text(f"{rank}")
    process_identity.BOOT_ID = path / f"boot_{rank}"  # of this forked rank
    monitor = PeerMonitor(RunFolder(path), rank, 2, path, Progress())
    if rank == 1:
        for _ in range(10):
            monitor.beat(0.1, read_others=False)
            time.sleep(0.1)
        dist.barrier()
        dist.barrier()
        return []
    alive = sorted(monitor.vanished(1.0)), sorted(monitor.lost())
    dist.barrier()
    silent = sorted(monitor.vanished(0.5)), sorted(monitor.lost())
    dist.barrier()
    return [*alive, *silent]


def test_a_host_without_a_sign_of_life_is_lost(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert run_ranks(a_host_that_falls_silent, 2, tmp_path)[0] == [[], [], [1], [1]]
