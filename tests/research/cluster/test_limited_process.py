"""A function in a child that may use little memory and time: its result, its Mistakes, and the end of what takes more."""

import faulthandler
import gc
import os
import signal
import threading
import time

import pytest

from parallel.errors import Mistake
from research.cluster.limited_process import run_limited


def run(function, cpu_seconds: float = 5.0, memory: int = 64 * 2**20):
    return run_limited(function, "the work", "do less", cpu_seconds, memory)


def test_its_result_comes_back_and_nothing_else_happens_here():
    changed: list[int] = []
    assert run(lambda: [os.getpid() != os.getppid(), changed.append(1), {"a": [1.5, None]}]) == [True, None, {"a": [1.5, None]}]
    assert changed == []


class WaitsForAThread:
    """Garbage of this process whose destructor would never return in the child, as that of torch's process groups."""

    def __init__(self, ended: threading.Event) -> None:
        self.itself, self.ended = self, ended

    def __del__(self) -> None:
        self.ended.wait()


def test_the_child_does_not_collect_this_processs_garbage():
    ended = threading.Event()
    gc.disable()
    try:
        WaitsForAThread(ended)
        assert run(lambda: gc.collect() >= 0, cpu_seconds=0.3) is True
    finally:
        ended.set()
        gc.enable()


def test_its_mistakes_are_raised_and_other_errors_are_one():
    def refuses():
        raise Mistake("a = 1 → use 2")

    with pytest.raises(Mistake, match="^a = 1 → use 2$"):
        run(refuses)
    with pytest.raises(Mistake, match="^the work fails .ZeroDivisionError: division by zero. → do less$"):
        run(lambda: 1 / 0)


def test_what_takes_too_much_is_ended_and_said():
    """Memory that Python refuses, a loop, a wait, a result without end, and a child that dies: each is said by its own name."""

    def loops():
        while True:
            pass

    def said(words: str, function, cpu_seconds: float = 5.0) -> None:
        with pytest.raises(Mistake, match=f"^the work {words} → do less$"):
            run(function, cpu_seconds)

    said("fails .it needs more memory.", lambda: len(bytearray(2**30)))
    said("takes more than 1 s of CPU time", loops, cpu_seconds=1.0)
    said("has not ended in 1 s", lambda: time.sleep(100), cpu_seconds=0.1)
    said("makes a result of more than 16 MB", lambda: "x" * (2**24 + 1))
    said("fails .TypeError: Object of type set is not JSON serializable.", lambda: {1})
    said("ends its process with exit code 134", lambda: os._exit(134))
    said("ends its process by SIGABRT: it may take more than 64 MB", lambda: (faulthandler.disable(), os.abort()))
    said("ends its process by SIGTERM", lambda: signal.raise_signal(signal.SIGTERM))
    assert run(lambda: len(bytearray(2**25))) == 2**25
