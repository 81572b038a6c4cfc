"""The watchdog ends a rank that was asked to end, that has lost another rank, or that hangs: real processes, stopped, killed and stuck."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from parallel.files import read_json
from research.cluster.exit_codes import HUNG
from research.reliability import diagnosis
from research.reliability.heartbeat import Stage
from research.reliability.watchdog import Watchdog
from research.tracking.run_folder import RunFolder
from tests.research.helpers.forked import codes, ranks, steps, wait_for


def told(path: Path) -> tuple[str, str]:
    """The status and the reason in run.json."""
    run = read_json(RunFolder(path).run)
    return run["status"], run.get("reason", "")


def said(path: Path, rank: int) -> str:
    return (path / f"stderr_{rank}").read_text()


def left(path: Path) -> list[str]:
    """Files in logs/ beside the ranks' logs."""
    return sorted(file.name for file in (path / "logs").iterdir() if file.suffix != ".txt")


def training(path: Path) -> None:
    """Until both ranks are under way."""
    wait_for(path / "step_0", path / "step_1")


def test_a_run_that_ends_leaves_no_heartbeat(tmp_path: Path) -> None:
    with ranks(steps, 2, tmp_path / "a", 60.0, until=30) as begun:
        assert codes(begun) == [0, 0]
    assert told(tmp_path / "a") == ("finished", "")
    assert left(tmp_path / "a") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_one_rank_stops_both_after_the_same_step(number: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    with ranks(steps, 2, path) as begun:
        training(path)
        os.kill(begun[1].pid, number)
        assert codes(begun) == [128 + number] * 2
    assert (path / "saved_0").read_text() == (path / "saved_1").read_text()
    assert left(path) == []


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_was_killed_is_named_by_the_other(victim: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    with ranks(steps, 2, path) as begun:
        training(path)
        os.kill(begun[victim].pid, signal.SIGKILL)
        expected = [1, 1]
        expected[victim] = -signal.SIGKILL
        assert codes(begun) == expected
        who = f"rank {victim} (process {begun[victim].pid} on "
    status, reason = told(path)
    assert status == "failed" and reason.startswith(who) and "is gone without a word, last seen" in reason
    assert said(path, 1 - victim).startswith(f"error  {who}") and said(path, 1 - victim).count("\n") == 1


def waits_in_vain(watch: Watchdog, rank: int, path: Path) -> int:
    """Rank 0 waits where no exception ever comes, as NCCL does."""
    watch.note_signals()
    (path / f"step_{rank}").write_text("1")
    while True:
        time.sleep(0.1)


@pytest.mark.slow
def test_a_rank_whose_collective_does_not_raise_leaves_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with ranks(waits_in_vain, 2, path) as begun:
        training(path)
        os.kill(begun[1].pid, signal.SIGKILL)
        assert codes(begun) == [1, -signal.SIGKILL]
        assert told(path)[1].startswith(f"rank 1 (process {begun[1].pid} on ")
    assert "waits_in_vain" in (path / "logs/rank_0.txt").read_text()


def one_raises(watch: Watchdog, rank: int, path: Path) -> int:
    if rank == 1:
        raise ValueError("no such head")
    dist.barrier()
    return 0


def test_a_rank_that_raised_is_the_cause_and_says_why(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with ranks(one_raises, 2, path) as begun:
        assert codes(begun) == [1, 1]
    status, reason = told(path)
    assert status == "failed" and reason.startswith("rank 1 (") and reason.endswith("has left: ValueError: no such head")
    assert "ValueError: no such head" in said(path, 1) and "Traceback" not in said(path, 0)


def test_a_stopped_rank_is_named_with_its_stack_and_taken_along(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with ranks(steps, 2, path, 4.0) as begun:
        training(path)
        wait_for(path / "logs/rank_1.alive.json")
        time.sleep(1.5)  # a heartbeat from within the steps
        os.kill(begun[1].pid, signal.SIGSTOP)
        assert codes(begun) == [HUNG, -signal.SIGKILL]
        who = f"rank 1 (process {begun[1].pid} on "
    status, reason = told(path)
    assert status == "failed" and reason.startswith("no progress for ")
    assert f": {who}" in reason and "gave its last sign of life at " in reason and ", in step " in reason
    assert "rank 0" not in reason
    log = (path / "logs/rank_0.txt").read_text()
    assert "rank 1, as it last said:" in log and log.count(" steps\n") == 2  # rank 1's own stack, and rank 0's
    assert f"error  {reason} → " in said(path, 0)


def one_sleeps(watch: Watchdog, rank: int, path: Path) -> int:
    watch.note_signals()
    watch.progress.stepping(3)
    if rank == 1:
        falls_asleep()
    dist.barrier()
    return 0


def falls_asleep() -> None:
    while True:
        time.sleep(0.1)


@pytest.mark.slow
def test_where_all_are_alive_the_odd_one_out_is_marked(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with ranks(one_sleeps, 2, path, 4.0) as begun:
        assert set(codes(begun)) == {HUNG}
    status, reason = told(path)
    assert status == "failed" and ", though every rank is alive: rank 0 in step 3, in " in reason
    rank_0, rank_1 = reason.split("rank 1 in step 3, in ")
    assert rank_1.startswith("falls_asleep (") and rank_1.endswith(" ← the odd one out") and "odd" not in rank_0


def works(watch: Watchdog, rank: int, path: Path) -> int:
    """Rank 1 prepares something for much longer than hang_seconds, rank 0 waits for it, and nobody may call that a hang."""
    with watch.progress.work("preparing"):
        (path / f"step_{rank}").write_text("0")
        if rank == 1:
            time.sleep(7.0)
        dist.barrier()
    return 0


@pytest.mark.slow
def test_work_that_may_take_any_time_is_no_hang(tmp_path: Path) -> None:
    with ranks(works, 2, tmp_path / "a", 2.0) as begun:
        assert codes(begun) == [0, 0]


@pytest.mark.slow
def test_a_rank_that_is_stopped_in_such_work_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with ranks(works, 2, path, 4.0) as begun:
        training(path)
        os.kill(begun[1].pid, signal.SIGSTOP)
        assert codes(begun) == [HUNG, -signal.SIGKILL]
    assert f"rank 1 (process {begun[1].pid} on " in told(path)[1]


def slow_steps(watch: Watchdog, rank: int, path: Path) -> int:
    """Steps of three seconds, counted while the process runs."""
    stop, step = watch.note_signals(), 0
    while not (found := stop.agreed()):
        step += 1
        watch.progress.stepping(step)
        (path / f"step_{rank}").write_text(str(step))
        for _ in range(30):
            time.sleep(0.1)
    return found


@pytest.mark.slow
def test_a_suspended_job_has_not_hung(tmp_path: Path) -> None:
    """Ctrl-Z in a step, for longer than hang_seconds, then fg."""
    path = tmp_path / "a"
    with ranks(slow_steps, 1, path, 8.0) as begun:
        wait_for(path / "step_0")
        time.sleep(1.0)
        for number, pause in ((signal.SIGSTOP, 12.0), (signal.SIGCONT, 4.0), (signal.SIGTERM, 0.0)):
            os.kill(begun[0].pid, number)
            time.sleep(pause)
        assert codes(begun) == [128 + signal.SIGTERM]
    assert told(path) == ("interrupted", "SIGTERM")


def impatient(watch: Watchdog, rank: int, path: Path) -> int:
    diagnosis.PATIENCE[Stage.TRAINING] = 5.0
    diagnosis.STOPPED_SECONDS = 2.0
    return steps(watch, rank, path)


@pytest.mark.slow
def test_who_was_asked_to_end_and_cannot_leaves_with_the_signals_code(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with ranks(impatient, 2, path) as begun:
        training(path)
        os.kill(begun[1].pid, signal.SIGSTOP)
        os.kill(begun[0].pid, signal.SIGUSR1)
        assert codes(begun) == [128 + signal.SIGUSR1, -signal.SIGKILL]
    status, reason = told(path)
    assert (
        status == "interrupted" and reason.startswith("SIGUSR1, but no progress for ") and f"rank 1 (process {begun[1].pid} on " in reason
    )
    assert not (path / "saved_0").exists()


def starts_slowly(watch: Watchdog, rank: int, path: Path) -> int:
    """Before the first step, in a collective that does not end: no Python runs there, so no handler does."""
    (path / f"step_{rank}").write_text("0")
    if rank == 1:
        time.sleep(1000.0)
    dist.barrier()
    return 0


@pytest.mark.slow
def test_in_start_up_a_signal_ends_even_a_rank_that_waits_for_others(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with ranks(starts_slowly, 2, path) as begun:
        training(path)
        os.kill(begun[0].pid, signal.SIGTERM)
        assert codes(begun) == [143, 143]  # rank 1 hears of it from rank 0's last heartbeat
    assert told(path) == ("interrupted", said(path, 1) or told(path)[1]) and told(path)[1].startswith("SIGTERM")
    assert said(path, 0) == said(path, 1) == ""


def test_a_signal_in_start_up_is_the_reason_for_all(tmp_path: Path) -> None:
    """Rank 1 leaves at once; rank 0, which finds its connection closed, has been interrupted and has not failed."""
    path = tmp_path / "a"
    with ranks(starts_slowly, 2, path) as begun:
        training(path)
        os.kill(begun[1].pid, signal.SIGTERM)
        assert codes(begun) == [143, 143]
    assert told(path) == ("interrupted", "SIGTERM")
