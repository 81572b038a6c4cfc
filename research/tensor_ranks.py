"""Starts the other tensor ranks of a model that writes, as processes of this machine, and lets them go at the end.

Rank 0 is this process: it has the terminal, the prompts, the requests. Fresh interpreters, not forks: CUDA does not survive one.
"""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from models.decoder import Decoder
from models.led import Leader, follow
from parallel import distributed
from parallel.errors import Mistake
from parallel.grid import Grid, make_grid
from research.launch import refuse
from research.machine import ALONE, threads_per_rank
from research.restore import Plan, decoder_of

GRACE = 5.0
"""Seconds that a rank has to leave, or this process to hear the error of one that has left."""


@contextlib.contextmanager
def opened(plan: Plan, tensor: int) -> Iterator[Decoder]:
    """A decoder of the planned model on `tensor` ranks: GPU i where there are GPUs (not run), else processes that share the cores."""
    if tensor == 1:
        yield decoder_of(plan, Grid())
        return
    if torch.cuda.is_available() and torch.cuda.device_count() < tensor:
        raise Mistake(f"--tensor {tensor} needs as many GPUs, this machine has {torch.cuda.device_count()} → use that or fewer")
    with tempfile.TemporaryDirectory() as folder, _others(plan, tensor, folder):
        try:
            decoder = _joined(plan, 0, tensor, folder)
            assert isinstance(decoder, Leader)
            yield decoder
            decoder.release()  # not after an error: the other ranks may be in another collective, and are ended
        finally:
            distributed.stop()


@contextlib.contextmanager
def _others(plan: Plan, tensor: int, folder: str) -> Iterator[None]:
    """Ranks 1 … tensor − 1. None outlives this; where one dies before its time, this process does not wait for it for ever."""
    spawn = multiprocessing.get_context("spawn")
    ranks: list[BaseProcess] = [spawn.Process(target=_follower, args=(plan, i, tensor, folder), daemon=True) for i in range(1, tensor)]
    for process in ranks:
        process.start()
    over, patience = threading.Event(), 0.0
    threading.Thread(target=_watch, args=(ranks, over), daemon=True).start()
    try:
        yield
        patience = GRACE
    finally:
        over.set()
        for process in ranks:
            process.join(patience)
            process.kill()
            process.join()


def _watch(ranks: list[BaseProcess], over: threading.Event) -> None:
    """Ends this process once another rank has died, which has said why itself: NCCL would wait for it for half an hour."""
    wait([process.sentinel for process in ranks])
    if not over.wait(GRACE):
        os._exit(1)


def _joined(plan: Plan, rank: int, tensor: int, folder: str) -> Decoder:
    torch.set_num_threads(threads_per_rank(replace(ALONE, world=tensor, local_world=tensor)))
    distributed.meet(rank, tensor, rank, f"file://{Path(folder) / 'rendezvous'}")
    return decoder_of(plan, make_grid(1, tensor))


def _follower(plan: Plan, rank: int, tensor: int, folder: str) -> None:
    """Another rank's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: rank 0 decides what it means
    threading.Thread(target=_die_with_rank_0, daemon=True).start()
    try:
        follow(_joined(plan, rank, tensor, folder))
    except Mistake as mistake:
        refuse(mistake, rank)  # after a while: rank 0 has met the same, says it, and ends this process
    distributed.stop()


def _die_with_rank_0() -> None:
    """A rank that waits in a collective would wait on after rank 0 was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
