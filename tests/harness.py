"""Runs a function on n real ranks: forked from one preloaded server, gloo over a file, a timeout that kills, every traceback shown."""

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "deepspeed",
    "deepspeed.pipe",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.original_muon",
    "deepspeed.runtime.bf16_optimizer",
    "tests.harness",
]
"""Imported once in the server: six seconds a test become half a second."""


class RankFailed(AssertionError):
    """One or more ranks raised, died or hung; the message holds each one's traceback."""


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """`function(*arguments)` on `world` ranks with torch.distributed up; the results in rank order.

    `function` and its results must pickle (a module-level function; numbers, tensors, dicts of them). No rank outlives the
    call: after the first failure, or after `timeout` seconds, the others are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        ranks = [
            context.Process(target=_rank_main, args=(function, rank, world, folder, pipes[rank][1], arguments), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        try:
            return _collect([mine for mine, _ in pipes], time.monotonic() + timeout, timeout)
        finally:
            for process in ranks:
                process.kill() if process.is_alive() else None
                process.join()


def _collect(pipes: list, deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(enumerate(pipes))
    while waiting and time.monotonic() < deadline:
        for ready in wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic())):
            rank = pipes.index(ready)
            del waiting[rank]
            try:
                worked, value = ready.recv()
            except EOFError:
                worked, value = False, "died without a word"
            (results if worked else failures)[rank] = value
        if failures:  # the others wait for the lost one: give their own errors a moment to arrive
            deadline = min(deadline, time.monotonic() + 2.0)
    if failures or waiting:
        hung = {rank: f"no answer within {timeout:.0f} s (or 2 s after another rank failed)" for rank in waiting}
        raise RankFailed("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted((failures | hung).items())))
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(function: Callable, rank: int, world: int, folder: str, pipe: Any, arguments: tuple) -> None:
    import torch

    from parallel import distributed

    torch.set_num_threads(1)
    try:
        distributed.start(rank, world, rank, f"file://{Path(folder) / 'rendezvous'}")
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        distributed.stop()
