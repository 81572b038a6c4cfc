"""Ranks that wait for each other end after seconds, and it is said where each of them stands."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from research.cluster import forked_ranks
from research.reliability.heartbeat import Heartbeat
from research.verification.hangs import describe_hang, ended_if_hung, hung_ranks
from tests.harness import start_server

SECONDS = 2.0


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """The tests' own server, from which research.cluster.forked_ranks then forks too."""
    start_server()


def sum_without_rank_1(folder: Path) -> None:
    """Rank 1 waits for a message that nobody sends, rank 0 for rank 1."""
    rank = dist.get_rank()
    with ended_if_hung(folder, rank, SECONDS) as progress:
        progress.stepping(3)
        progress.advance("forward from blocks.0 on")
        if rank == 1:
            dist.recv(torch.empty(1), src=0)
        dist.all_reduce(torch.ones(1))


def slow_but_moving(folder: Path) -> None:
    """Takes longer than a hang may, and is not one."""
    with ended_if_hung(folder, dist.get_rank(), 1.0) as progress:
        for _ in range(6):
            time.sleep(0.3)
            progress.advance("working")


def test_a_hang_is_ended_and_described(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(forked_ranks.RankFailed):
        forked_ranks.run(sum_without_rank_1, 2, tmp_path, timeout=120.0)
    assert time.monotonic() - began < 60, "the timeout is for ranks that hang before they are watched"
    found = hung_ranks(tmp_path, 2)
    assert set(found) == {0, 1} and all(heartbeat.step == 3 and heartbeat.waits for heartbeat in found.values())
    first, *others = describe_hang(SECONDS, found, 2).splitlines()
    assert first == "hangs: no rank made progress for 2 s"
    assert others[0].startswith("rank 0 in step 3, forward from blocks.0 on, waits in all_reduce")
    assert any(line.endswith(" sum_without_rank_1") and "test_hangs.py" in line for line in others[1:5])
    assert any(line.startswith("rank 1 in step 3, forward from blocks.0 on, waits in recv") for line in others)


@pytest.mark.slow
def test_slow_ranks_are_no_hang(tmp_path: Path) -> None:
    forked_ranks.run(slow_but_moving, 1, tmp_path)
    assert hung_ranks(tmp_path, 1) == {}


def test_the_rank_that_does_not_wait_is_the_odd_one_out() -> None:
    stacks = {0: ["models/block.py:31 forward", "…/site-packages/torch/distributed/c10d.py:9 all_reduce"], 1: ["variant.py:7 forward"]}
    found = {rank: Heartbeat(rank, 1, 1, "", "training", "backward", 2, stack, left="hang") for rank, stack in stacks.items()}
    assert describe_hang(30.0, found, 3).splitlines() == [
        "hangs: no rank made progress for 30 s",
        "rank 0 in step 2, backward, waits in all_reduce",
        "    models/block.py:31 forward",
        "rank 1 in step 2, backward ← the odd one out",
        "    variant.py:7 forward",
        "rank 2 says nothing",
    ]
