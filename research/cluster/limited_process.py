"""Runs a function on a stranger's data in a child process that has little memory and little time, and says what became of it.

The child is forked, so that it starts at once with everything imported. It computes on the CPU only; it may not use CUDA or the ranks of
its parent. Of its result only JSON comes back.
"""

import contextlib
import json
import math
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import psutil

from parallel.errors import Mistake
from research.cluster.environment import environment

LARGEST_ANSWER = 2**24
"""The most bytes of a result."""
PATIENCE = 10
"""How many times its CPU seconds a child may take by the clock: it may wait for a core or a disk, but not for ever."""
SINGLE = {"TOKENIZERS_PARALLELISM": "false"}
"""The tokenizers library would otherwise start a thread for each core, each with memory of its own."""


def limit_address_space(num_bytes: int) -> None:
    """Limits all memory that this process can ever map, where the system has such a limit."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


def run_limited(function: Callable[[], Any], what: str, way_out: str, cpu_seconds: float, memory: int) -> Any:
    """The result of `function`, as JSON data, from a child that may use `memory` bytes more than this process and `cpu_seconds`.

    A Mistake of the function is raised here. So is one that begins with `what` and ends in `way_out` if the child needs more than it has,
    dies or raises anything else.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child does not use what they may have locked
        child = os.fork()
    if child == 0:
        os.close(reading)
        _be_child(function, writing, cpu_seconds, memory)
    os.close(writing)
    try:
        answer = _received(reading, time.monotonic() + PATIENCE * cpu_seconds)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    if answer is None:
        size = f"{memory / 2**20:,.0f} MB"
        timed_out = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        raise Mistake(f"{what} takes more than {f'{cpu_seconds:.0f} s' if timed_out else size} → {way_out}")
    if "mistake" in answer:
        raise Mistake(answer["mistake"])
    if "error" in answer:
        raise Mistake(f"{what} fails ({answer['error']}) → {way_out}")
    return answer["value"]


def _received(reading: int, deadline: float) -> dict[str, Any] | None:
    """The child's answer; None if it ends without one, is too slow, or sends too much."""
    received = b""
    while (left := deadline - time.monotonic()) > 0 and len(received) <= LARGEST_ANSWER:
        if not select.select([reading], [], [], left)[0]:
            return None
        part = os.read(reading, 2**16)
        if not part:
            with contextlib.suppress(ValueError):
                return json.loads(received)
            return None
        received += part
    return None


def _be_child(function: Callable[[], Any], writing: int, cpu_seconds: float, memory: int) -> NoReturn:
    """The child's whole life. It ends without running anything that its parent has left for its own end."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):  # a panic in Rust reports itself there, an abort in C
            os.dup2(null, descriptor)
        with environment(SINGLE):
            _limit(cpu_seconds, memory)
            answer = _answer_of(function)
        sent = memoryview(json.dumps(answer).encode())
        while sent:
            sent = sent[os.write(writing, sent) :]
    finally:
        os._exit(0)


def _limit(cpu_seconds: float, memory: int) -> None:
    """Sets the limits. The memory is that of data, which reserved addresses are not counted in: each thread reserves 64 MB of these."""
    seconds, used = math.ceil(cpu_seconds), psutil.Process().memory_info().data
    limits = {resource.RLIMIT_DATA: used + memory, resource.RLIMIT_CPU: seconds, resource.RLIMIT_CORE: 0}
    for limit, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # not every system has it
            resource.setrlimit(limit, (value, value + (limit == resource.RLIMIT_CPU)))


def _answer_of(function: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": function()}
    except Mistake as mistake:
        return {"mistake": str(mistake)}
    except MemoryError:
        return {"error": "it needs more memory"}
    except BaseException as error:  # Rust panics are not even Exceptions
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
