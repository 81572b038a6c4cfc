"""Starts the other tensor ranks of a model that writes or scores, as processes of this machine, and lets them go at the end.

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
from typing import Protocol, TypeVar, runtime_checkable

import torch

from parallel import distributed
from parallel.errors import Mistake
from parallel.grid import Grid, make_grid
from research.cluster.environment import ALONE, threads_per_rank
from research.cluster.exit_codes import refuse

Led = TypeVar("Led", covariant=True)
GRACE = 5.0
"""Seconds that a rank has to leave, or this process to hear the error of one that has left."""


class Planned(Protocol[Led]):
    """What every rank makes of the same plan (research/generation/restore.py). It travels to other processes."""

    def on(self, grid: Grid) -> Led:
        """This rank's part; that of rank 0 leads the others, and has `release`."""

    def follow(self, grid: Grid) -> None:
        """Another rank's whole work."""


@runtime_checkable
class Leads(Protocol):
    """A leader."""

    def release(self) -> None:
        """Lets the other ranks go."""


@contextlib.contextmanager
def opened(plan: Planned[Led], tensor: int) -> Iterator[Led]:
    """What is planned, on `tensor` ranks: GPU i where there are GPUs (not run), else processes that share the cores."""
    if tensor == 1:
        yield plan.on(Grid())
        return
    if torch.cuda.is_available() and torch.cuda.device_count() < tensor:
        raise Mistake(f"--tensor {tensor} needs as many GPUs, this machine has {torch.cuda.device_count()} → use that or fewer")
    with tempfile.TemporaryDirectory() as folder, _others(plan, tensor, folder):
        try:
            led = plan.on(_joined(0, tensor, folder))
            assert isinstance(led, Leads)
            yield led
            led.release()  # not after an error: the other ranks may be in another collective, and are ended
        finally:
            distributed.stop()


@contextlib.contextmanager
def _others(plan: Planned, tensor: int, folder: str) -> Iterator[None]:
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


def _joined(rank: int, tensor: int, folder: str) -> Grid:
    torch.set_num_threads(threads_per_rank(replace(ALONE, world=tensor, local_world=tensor)))
    distributed.init_process_group(rank, tensor, rank, f"file://{Path(folder) / 'rendezvous'}")
    return make_grid(1, tensor)


def _follower(plan: Planned, rank: int, tensor: int, folder: str) -> None:
    """Another rank's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: rank 0 decides what it means
    threading.Thread(target=_die_with_rank_0, daemon=True).start()
    try:
        plan.follow(_joined(rank, tensor, folder))
    except Mistake as mistake:
        refuse(mistake, rank)  # after a while: rank 0 has met the same, says it, and ends this process
    distributed.stop()


def _die_with_rank_0() -> None:
    """A rank that waits in a collective would wait on after rank 0 was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
