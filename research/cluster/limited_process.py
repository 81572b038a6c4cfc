"""Runs a function on a stranger's data in a child process that has little memory and little time, and says what became of it.

The child is forked, so that it starts at once with everything imported. It computes on the CPU only; it may not use CUDA or the ranks of
its parent. Of its result only JSON comes back.
"""

import contextlib
import gc
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
        received, ended = _received(reading, time.monotonic() + PATIENCE * cpu_seconds)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    if len(received) > LARGEST_ANSWER:
        raise Mistake(f"{what} makes a result of more than {LARGEST_ANSWER / 2**20:,.0f} MB → {way_out}")
    if not ended:
        raise Mistake(f"{what} has not ended in {PATIENCE * cpu_seconds:,.0f} s → {way_out}")
    try:
        answer = json.loads(received)
    except ValueError:  # none, or a part of one
        raise Mistake(f"{what} {_ending(status, cpu_seconds, memory)} → {way_out}") from None
    if "mistake" in answer:
        raise Mistake(answer["mistake"])
    if "error" in answer:
        raise Mistake(f"{what} fails ({answer['error']}) → {way_out}")
    return answer["value"]


def _received(reading: int, deadline: float) -> tuple[bytes, bool]:
    """What the child sends, and whether it has ended in time. No more is read than shows that it is too much."""
    received = b""
    while (left := deadline - time.monotonic()) > 0 and len(received) <= LARGEST_ANSWER:
        if not select.select([reading], [], [], left)[0]:
            return received, False
        part = os.read(reading, 2**16)
        if not part:
            return received, True
        received += part
    return received, False


def _ending(status: int, cpu_seconds: float, memory: int) -> str:
    """How a child has ended that gave no answer. Libraries abort, or fault, where they get no more memory."""
    if not os.WIFSIGNALED(status):
        return f"ends its process with exit code {os.WEXITSTATUS(status)}"
    number = os.WTERMSIG(status)
    if number == signal.SIGXCPU:
        return f"takes more than {cpu_seconds:.0f} s of CPU time"
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number in (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS):
        return f"ends its process by {name}: it may take more than {memory / 2**20:,.0f} MB"
    return f"ends its process by {name}"


def _be_child(function: Callable[[], Any], writing: int, cpu_seconds: float, memory: int) -> NoReturn:
    """The child's whole life. It ends without running anything that its parent has left for its own end."""
    try:
        gc.freeze()  # so the parent's garbage is not collected here: a destructor that waits for a thread of the parent would hang
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):  # a panic in Rust reports itself there, an abort in C
            os.dup2(null, descriptor)
        with environment(SINGLE):
            _limit(cpu_seconds, memory)
            sent = memoryview(_answer_of(function))
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


def _answer_of(function: Callable[[], Any]) -> bytes:
    """The JSON of the function's value, or of what it raised instead; so of a value that is no JSON."""
    try:
        return json.dumps({"value": function()}).encode()
    except Mistake as mistake:
        answer = {"mistake": str(mistake)}
    except MemoryError:
        answer = {"error": "it needs more memory"}
    except BaseException as error:  # Rust panics are not even Exceptions
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return json.dumps(answer).encode()
