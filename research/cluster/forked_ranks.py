"""Runs a function on n ranks of this machine: forked from one preloaded server, gloo over a file, a timeout that kills.

What a rank computes it writes into a folder; nothing is sent back as a pickle.
"""

import gc
import multiprocessing
import multiprocessing.forkserver
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from parallel.errors import Mistake
from research.cluster.environment import environment

PRELOAD = (
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "deepspeed",
    "deepspeed.pipe",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.muon.original_muon",
    "deepspeed.runtime.zero.stage3",
    "einops._torch_specific",
    "parallel.engines.engine",
    "models.gpt",
    "research.training.loop",
)
"""Modules imported once in the server, so that a rank starts in a tenth of a second."""

CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
"""The environment of the server and of every rank: they run on the CPU of any machine, because what is tested is arithmetic."""

GRACE = 2.0
"""Seconds that the other ranks have after the first failure. They wait for the lost rank in vain, but may report errors of their own."""


class RankFailed(RuntimeError):
    """A rank raised, died or hung. The message holds the traceback of each."""


def run(function: Callable[[Path], None], world: int, folder: Path, timeout: float = 300.0) -> None:
    """`function(folder)` on `world` ranks with torch.distributed up. `function` is at module level. No rank outlives the call."""
    ranks = start(_rank_main, [(function, rank, world, folder) for rank in range(world)])
    try:
        deadline = time.monotonic() + timeout
        while (running := [process for process in ranks if process.exitcode is None]) and time.monotonic() < deadline:
            wait([process.sentinel for process in running], timeout=max(0.0, deadline - time.monotonic()))
            if any(process.exitcode for process in ranks):
                deadline = min(deadline, time.monotonic() + GRACE)
    finally:
        hung = [process.exitcode is None for process in ranks]
        end(ranks)

    failures = []
    for rank, process in enumerate(ranks):
        text = folder / f"traceback_{rank}.txt"
        if hung[rank]:
            failures.append(f"--- rank {rank} ---\nno answer within {timeout:.0f} s (or {GRACE:.0f} s after another rank failed)")
        elif process.exitcode:
            failures.append(f"--- rank {rank} ---\n{text.read_text() if text.is_file() else f'died without a word ({process.exitcode})'}")
    if failures:
        raise RankFailed("\n".join(failures))


def start(target: Callable[..., None], arguments: Sequence[tuple]) -> list[ForkServerProcess]:
    """One process for each of `arguments`, forked from the server and running `target`, which is at module level."""
    start_server()
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=target, args=own, daemon=True) for own in arguments]
    for process in ranks:
        process.start()
    return ranks


def start_server(preload: Sequence[str] = PRELOAD) -> None:
    """Start the process that ranks are forked from, with the modules of `preload` imported. Does nothing if it already runs."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
    with environment(CPU):
        multiprocessing.forkserver.ensure_running()


def end(ranks: Sequence[ForkServerProcess]) -> None:
    """Kill the processes that still run, and wait until all have ended."""
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()


def exit_with_parent() -> None:
    """End this process when the one that started it has died. Without it, a rank would wait in a collective for half an hour."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _rank_main(function: Callable[[Path], None], rank: int, world: int, folder: Path) -> None:
    import torch

    from parallel import distributed

    gc.freeze()  # the server's objects are nobody's garbage: without this, ZeRO-3's gc.collect() takes a second
    threading.Thread(target=exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        distributed.start(rank, world, rank, f"file://{folder / 'rendezvous'}")
        function(folder)
    except Mistake as mistake:
        (folder / f"traceback_{rank}.txt").write_text(f"{mistake}\n")
        raise SystemExit(2) from None
    except BaseException:
        (folder / f"traceback_{rank}.txt").write_text(traceback.format_exc())
        raise SystemExit(1) from None
    finally:
        distributed.stop()
