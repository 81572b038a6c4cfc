"""Runs a function on n real ranks: forked from one preloaded server, gloo over a file, a timeout that kills, every traceback shown."""

import contextlib
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

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
    "torch._subclasses.schema_check_mode",
    "pytest",
    "parallel.engines.engine",
    "parallel.checkpoint.load",
    "models.gpt",
    "tests.harness",
]
"""Imported once in the server: six seconds a test become half a second."""

SERVER_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
"""Of the server and so of every rank: CPU ranks on any machine, without DeepSpeed's warning that it found no GPU."""


class RankFailed(AssertionError):
    """One or more ranks raised, died or hung; the message holds each one's traceback."""


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """`function(*arguments)` on `world` ranks with torch.distributed up; the results in rank order.

    `function` and its results must pickle (a module-level function; numbers, tensors, dicts of them). No rank outlives the
    call: after the first failure, or after `timeout` seconds, the others are killed. Nor does one outlive its caller.
    """
    context = multiprocessing.get_context("forkserver")
    start_server()
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


def start_server() -> None:
    """The process that ranks are forked from, with PRELOAD imported; does nothing where it already runs."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    with _environment(SERVER_ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _collect(pipes: list, deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(enumerate(pipes))
    while waiting and time.monotonic() < deadline:
        for ready in wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic())):
            rank = pipes.index(ready)
            del waiting[rank]
            try:
                worked, value = pickle.loads(ready.recv_bytes())
            except EOFError:
                worked, value = False, "died without a word"
            (results if worked else failures)[rank] = value
        if failures:  # the others wait for the lost one: give their own errors a moment to arrive
            deadline = min(deadline, time.monotonic() + 2.0)
    if failures or waiting:
        hung = dict.fromkeys(waiting, f"no answer within {timeout:.0f} s (or 2 s after another rank failed)")
        raise RankFailed("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted((failures | hung).items())))
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(function: Callable, rank: int, world: int, folder: str, pipe: Any, arguments: tuple) -> None:
    import torch

    from parallel import distributed

    gc.freeze()  # the server's million objects are nobody's garbage: without this, ZeRO-3's gc.collect() takes a second
    threading.Thread(target=_die_with_caller, daemon=True).start()
    torch.set_num_threads(1)
    try:
        distributed.start(rank, world, rank, f"file://{Path(folder) / 'rendezvous'}")
        _answer(pipe, True, function(*arguments))
    except BaseException:
        _answer(pipe, False, traceback.format_exc())
    finally:
        pipe.close()
        distributed.stop()


def _answer(pipe: Any, worked: bool, value: Any) -> None:
    # Plain bytes: torch's own reducer would send tensors as handles that are gone once this process has ended.
    pipe.send_bytes(pickle.dumps((worked, value)))


def _die_with_caller() -> None:
    """A rank that waits in a collective would wait on for half an hour after its caller was killed."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
