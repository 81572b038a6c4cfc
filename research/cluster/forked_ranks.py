"""Runs a function on n real ranks of this machine: forked from one preloaded server, gloo over a file, a timeout that kills.

What a rank finds out it writes into a folder; nothing is sent as a pickle.
"""

import gc
import multiprocessing
import multiprocessing.forkserver
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from parallel.errors import Mistake
from research.cluster.environment import environment

PRELOAD = [
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
]
"""Imported once in the server, so that a rank starts in a tenth of a second."""

CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
"""Every rank runs on the CPU, on any machine: the question is one of arithmetic, not of speed."""


class RankFailed(RuntimeError):
    """A rank raised, died or hung; the message holds each one's traceback."""


def run(function: Callable[[Path], None], world: int, folder: Path, timeout: float = 300.0) -> None:
    """`function(folder)` on `world` ranks with torch.distributed up. `function` is at module level. No rank outlives the call."""
    ranks = start(_rank_main, [(function, rank, world, folder) for rank in range(world)])
    try:
        _wait_for(ranks, time.monotonic() + timeout)
    finally:
        end(ranks)
    _raise_failures(ranks, folder)


def start(target: Callable[..., None], arguments: Sequence[tuple]) -> list[ForkServerProcess]:
    """One process for each of `arguments`, forked from the server and running `target`, which is at module level."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    with environment(CPU):
        multiprocessing.forkserver.ensure_running()
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=target, args=own, daemon=True) for own in arguments]
    for process in ranks:
        process.start()
    return ranks


def end(ranks: Sequence[ForkServerProcess]) -> None:
    """Kills those that are still there."""
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()


def _wait_for(ranks: list[ForkServerProcess], deadline: float) -> None:
    """Until all have ended, or two seconds after the first that failed: the others then wait for it in vain."""
    while (waiting := [process for process in ranks if process.exitcode is None]) and time.monotonic() < deadline:
        wait([process.sentinel for process in waiting], timeout=max(0.0, deadline - time.monotonic()))
        if any(process.exitcode for process in ranks):
            deadline = min(deadline, time.monotonic() + 2.0)


def _raise_failures(ranks: list[ForkServerProcess], folder: Path) -> None:
    failed = {rank: process.exitcode for rank, process in enumerate(ranks) if process.exitcode != 0}
    if not failed:
        return
    texts = {rank: folder / f"traceback_{rank}.txt" for rank in failed}
    said = {rank: text.read_text() if text.is_file() else f"ended with {failed[rank]} and no word" for rank, text in texts.items()}
    raise RankFailed("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in said.items()))


def _rank_main(function: Callable[[Path], None], rank: int, world: int, folder: Path) -> None:
    import torch

    from parallel import distributed

    gc.freeze()  # the server's objects are nobody's garbage: without this, ZeRO-3's gc.collect() takes a second
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
