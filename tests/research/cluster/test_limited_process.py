"""A function in a child that may use little memory and time: its result, its Mistakes, and the end of what takes more."""

import os

import pytest

from parallel.errors import Mistake
from research.cluster.limited_process import run_limited


def run(function, cpu_seconds: float = 5.0, memory: int = 64 * 2**20):
    return run_limited(function, "the work", "do less", cpu_seconds, memory)


def test_its_result_comes_back_and_nothing_else_happens_here():
    changed: list[int] = []
    assert run(lambda: [os.getpid() != os.getppid(), changed.append(1), {"a": [1.5, None]}]) == [True, None, {"a": [1.5, None]}]
    assert changed == []


def test_its_mistakes_are_raised_and_other_errors_are_one():
    def refuses():
        raise Mistake("a = 1 → use 2")

    with pytest.raises(Mistake, match="^a = 1 → use 2$"):
        run(refuses)
    with pytest.raises(Mistake, match="^the work fails .ZeroDivisionError: division by zero. → do less$"):
        run(lambda: 1 / 0)


def test_what_takes_too_much_is_ended_and_said():
    """Memory that Python refuses, memory that a library cannot do without, a loop, and a child that dies."""

    def loops():
        while True:
            pass

    with pytest.raises(Mistake, match="^the work fails .it needs more memory. → do less$"):
        run(lambda: len(bytearray(2**30)))
    with pytest.raises(Mistake, match="^the work takes more than 1 s → do less$"):
        run(loops, cpu_seconds=1.0)
    with pytest.raises(Mistake, match="^the work takes more than 64 MB → do less$"):
        run(lambda: os._exit(134))
    assert run(lambda: len(bytearray(2**25))) == 2**25
