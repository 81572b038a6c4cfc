"""The harness: a rank that raises, dies or hangs is reported with its own traceback, and no process is left behind."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness import ROOT, SERVER_ENVIRONMENT, RankFailed, run_ranks
from tests.parallel.helpers import training

HOUR = 3600


def my_place(offset: int) -> tuple[int, int]:
    total = torch.tensor(1.0)
    dist.all_reduce(total)
    return dist.get_rank() + offset, int(total)


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError(f"lost by rank {rank}")
    dist.barrier()  # waits for the lost one


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def hang_on(rank: int, folder) -> None:
    (folder / str(dist.get_rank())).write_text(str(os.getpid()))
    if dist.get_rank() == rank:
        time.sleep(HOUR)


def tell_environment() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in SERVER_ENVIRONMENT}


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits to be collected does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_results_come_in_rank_order(world: int) -> None:
    assert run_ranks(my_place, world, 10) == [(10 + rank, world) for rank in range(world)]


def test_an_exception_shows_its_rank_and_traceback() -> None:
    with pytest.raises(RankFailed) as failure:
        run_ranks(raise_on, 3, 1)
    told = str(failure.value)
    own = told.split("--- rank 1 ---")[1].split("--- rank 2 ---")[0]
    assert "KeyError: 'lost by rank 1'" in own and "in raise_on" in own and "Traceback" in own
    assert "lost by rank" not in told.split("--- rank 1 ---")[0], "a rank is given another one's words"


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RankFailed, match="--- rank 0 ---\ndied without a word"):
        run_ranks(die_on, 2, 0)


def test_a_hanging_rank_is_killed_in_time_and_named(tmp_path) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match="--- rank 1 ---\nno answer within 2 s") as failure:
        run_ranks(hang_on, 2, 1, tmp_path, timeout=2.0)
    assert time.monotonic() - start < 30, "a hang is to end at its timeout, not at the hour"
    assert "rank 0" not in str(failure.value), "rank 0 answered"
    pids = [int(file.read_text()) for file in tmp_path.iterdir()]
    assert len(pids) == 2 and wait_until(lambda: not any(map(alive, pids)), 5), "a rank outlived the call"


MAIN = """
import os, sys, time
from parallel import distributed
from tests import harness

distributed.start = lambda *place: None  # DeepSpeed, whose import takes seconds on each rank, is not the subject

def hang(pids):
    with open(pids, "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(3600)

if __name__ == "__main__":
    harness.start_server("torch")
    harness.run_ranks(hang, 2, sys.argv[1])
"""
"""A program whose two ranks hang, forked from a server of its own."""


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads /proc")
def test_no_rank_outlives_a_killed_caller(tmp_path) -> None:
    main = tmp_path / "main.py"
    main.write_text(MAIN)
    pids = tmp_path / "pids"
    caller = subprocess.Popen([sys.executable, str(main), str(pids)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        assert wait_until(lambda: pids.exists() and len(pids.read_text().splitlines()) == 2, 60), "the ranks did not start"
        ranks = [int(line) for line in pids.read_text().splitlines()]
        assert all(map(alive, ranks))
    finally:
        caller.send_signal(signal.SIGKILL)
        caller.wait()
    assert wait_until(lambda: not any(map(alive, ranks)), 5), "a rank waits on after its caller was killed"


def test_ranks_run_on_the_cpu_and_the_caller_keeps_its_environment() -> None:
    before = dict(os.environ)
    assert run_ranks(tell_environment, 1) == [SERVER_ENVIRONMENT]
    assert dict(os.environ) == before


FOUR_RANKS = [dict(pipe=2, tensor=2), dict(tensor=4), dict(pipe=2), dict(tensor=2), dict(zero_stage=3, micro=2)]


@pytest.mark.parametrize("layout", [FOUR_RANKS[0], *(pytest.param(layout, marks=pytest.mark.slow) for layout in FOUR_RANKS[1:])], ids=str)
def test_the_time_of_a_four_rank_engine_test_is_told(layout: dict, timed_run_ranks, request) -> None:
    """The line at the end of the run; a machine's speed is not asserted. Aim: 2 s or less on two cores."""
    losses = [found["loss"] for found in timed_run_ranks(training.call, 4, dict(layout, steps=1))]
    assert losses == [losses[0]] * 4, "every rank is told the same global loss"
