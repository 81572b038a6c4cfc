"""A signal to one rank stops all of them after the same step, none is lost, and before the first step one leaves at once."""

import os
import signal
import subprocess
import sys

import pytest
import torch.distributed as dist

from research import ROOT
from research.reliability.signals import Stop
from tests.harness import run_ranks


def steps_until_stopped(signals: dict[tuple[int, int], int]) -> list[int]:
    """Five looks at `Stop`; before look i of rank r this process sends itself signals[r, i]."""
    stop, found = Stop(), []
    for look in range(5):
        if number := signals.get((dist.get_rank(), look)):
            os.kill(os.getpid(), number)
        found.append(stop.agreed())
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("rank", [0, 1])
def test_both_ranks_stop_where_one_was_signalled(rank: int, number: int) -> None:
    assert run_ranks(steps_until_stopped, 2, {(rank, 2): number}) == [[0, 0, number, number, number]] * 2


def test_nobody_signalled_nobody_stops() -> None:
    assert run_ranks(steps_until_stopped, 2, {}) == [[0] * 5] * 2


def test_ctrl_c_followed_by_a_launchers_sigterm_is_a_ctrl_c() -> None:
    signals = {(0, 1): signal.SIGINT, (1, 1): signal.SIGINT, (0, 2): signal.SIGTERM, (1, 3): signal.SIGTERM}
    assert run_ranks(steps_until_stopped, 2, signals) == [[0, *[signal.SIGINT] * 4]] * 2


def signalled_while_agreeing() -> list[int]:
    """The signal comes while the ranks are talking, the moment at which a rank spends most of its looks."""
    stop, all_reduce = Stop(), dist.all_reduce

    def interrupted(*arguments, **options):
        all_reduce(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    dist.all_reduce = interrupted
    first = stop.agreed()
    dist.all_reduce = all_reduce
    return [first, stop.agreed()]


def test_a_signal_that_comes_while_the_ranks_agree_is_not_lost() -> None:
    assert run_ranks(signalled_while_agreeing, 2) == [[0, signal.SIGTERM]] * 2


LEAVES = """
import os, signal
from research.reliability.signals import leave_when_asked
leave_when_asked()
try:
    for number in {signals}:
        os.kill(os.getpid(), number)
finally:
    os.kill(os.getpid(), signal.SIGTERM)  # a launcher sends several
    print("closed")
print("not reached")
"""


@pytest.mark.parametrize(("signals", "code"), [([2], 130), ([15], 143), ([10, 2], 138)])
def test_before_the_first_step_a_signal_leaves_and_closes_what_is_open(signals: list[int], code: int) -> None:
    done = subprocess.run([sys.executable, "-c", LEAVES.format(signals=signals)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, "closed\n", "")


def test_two_signals_at_once_are_one() -> None:
    """Both pending before Python looks: neither a traceback nor a complaint about the second."""
    both = "signal.pthread_sigmask(signal.SIG_BLOCK, [2, 15]); os.kill(os.getpid(), 2); os.kill(os.getpid(), 15)"
    code = LEAVES.format(signals=[]).replace("try:\n", f"try:\n    {both}; signal.pthread_sigmask(signal.SIG_UNBLOCK, [2, 15])\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "closed\n", "")
