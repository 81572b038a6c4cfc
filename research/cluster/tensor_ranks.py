"""Starts the other tensor ranks of a model that generates or scores, as processes of this machine, and ends them afterwards.

Rank 0 is this process: it has the terminal, the prompts, the requests. The others are new interpreters, not forks, because CUDA
cannot be used after a fork.
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
from research.cluster.forked_ranks import exit_with_parent

Driver = TypeVar("Driver", covariant=True)
GRACE = 5.0
"""Seconds that a rank has to exit at the end, or, after a rank has died, to report its error before this process exits too."""


class Spec(Protocol[Driver]):
    """How every rank builds its part of a model (DecoderSpec and ScorerSpec in research/generation/restore.py). It must pickle."""

    def on(self, grid: Grid) -> Driver:
        """Builds the model on rank 0. With several tensor ranks it drives the others and has `release`."""

    def follow(self, grid: Grid) -> None:
        """Builds the model on another rank and works until rank 0 releases it."""


@runtime_checkable
class Releasing(Protocol):
    """A driver of other ranks."""

    def release(self) -> None:
        """Ends the work of the other ranks."""


@contextlib.contextmanager
def opened(plan: Spec[Driver], tensor: int) -> Iterator[Driver]:
    """The model on `tensor` ranks: on GPU i where there are GPUs (never run so far), else on processes that share the cores."""
    if tensor == 1:
        yield plan.on(Grid())
        return
    if torch.cuda.is_available() and torch.cuda.device_count() < tensor:
        raise Mistake(f"--tensor {tensor} needs as many GPUs, this machine has {torch.cuda.device_count()} → use that or fewer")
    with tempfile.TemporaryDirectory() as folder, _others(plan, tensor, folder):
        try:
            driver = plan.on(_joined(0, tensor, folder))
            assert isinstance(driver, Releasing)
            yield driver
            driver.release()  # not after an error: the other ranks may be in another collective, and are killed
        finally:
            distributed.stop()


@contextlib.contextmanager
def _others(plan: Spec, tensor: int, folder: str) -> Iterator[None]:
    """Runs ranks 1 … tensor − 1. None outlives this, and if one dies early, this process exits instead of waiting for it."""
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
    """Ends this process after another rank has died, which reports its error itself. NCCL would wait for it for half an hour."""
    wait([process.sentinel for process in ranks])
    if not over.wait(GRACE):
        os._exit(1)


def _joined(rank: int, tensor: int, folder: str) -> Grid:
    torch.set_num_threads(threads_per_rank(replace(ALONE, world=tensor, local_world=tensor)))
    distributed.init_process_group(rank, tensor, rank, f"file://{Path(folder) / 'rendezvous'}")
    return make_grid(1, tensor)


def _follower(plan: Spec, rank: int, tensor: int, folder: str) -> None:
    """The main function of another rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: rank 0 handles it
    threading.Thread(target=exit_with_parent, daemon=True).start()
    try:
        plan.follow(_joined(rank, tensor, folder))
    except Mistake as mistake:
        refuse(mistake, rank)  # this waits: rank 0 raises the same Mistake, reports it, and ends this process
    distributed.stop()
