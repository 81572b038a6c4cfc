"""A rank's process is known by more than its number."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from research.reliability.peers import Neighbours, Peer, all_peers, this_process
from tests.harness import run_ranks


@pytest.fixture
def other() -> Iterator[Peer]:
    """A process that sleeps, as rank 1 of this machine."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    yield replace(this_process(1), pid=process.pid, started=psutil.Process(process.pid).create_time())
    process.kill()
    process.wait()


def test_a_rank_that_has_ended_is_gone_before_anybody_asks_for_its_exit_code(other: Peer) -> None:
    neighbours = Neighbours([this_process(0), other], 0)
    assert neighbours.gone() == set()
    assert neighbours.kill(1)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert neighbours.gone() == {1}


def test_a_process_that_has_inherited_the_number_is_left_alone(other: Peer) -> None:
    neighbours = Neighbours([this_process(0), replace(other, started=other.started - 3600)], 0)
    assert neighbours.gone() == set() and not neighbours.kill(1)
    assert psutil.Process(other.pid).is_running()


def test_another_machines_process_is_left_alone(other: Peer) -> None:
    neighbours = Neighbours([this_process(0), replace(other, machine="another")], 0)
    assert not neighbours.kill(1) and not neighbours.kill(0)
    os.kill(other.pid, signal.SIGKILL)
    assert neighbours.gone() == set()


def who() -> list[tuple[int, int, str]]:
    from torch import distributed

    return [(peer.rank, peer.pid, peer.machine) for peer in all_peers(distributed.get_rank(), distributed.get_world_size())]


def test_all_ranks_know_all() -> None:
    first, second = run_ranks(who, 2)
    assert first == second and [rank for rank, _, _ in first] == [0, 1]
    assert first[0][1] != first[1][1] and first[0][2] == first[1][2] == this_process(0).machine
