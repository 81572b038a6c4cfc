"""Ranks that may be stopped, killed or hang: forked from the harness's server, and watched from outside. None outlives the test."""

import contextlib
import gc
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from research.cluster.environment import LOCALHOST, Ranks
from research.cluster.exit_codes import SIGNALLED
from research.reliability.parents import Parents
from research.reliability.peers import Lost
from research.reliability.signals import leave_when_asked
from research.reliability.watchdog import Watchdog, watchdog
from research.tracking import run_folder
from research.tracking.run_folder import FAILED, FINISHED, INTERRUPTED, RunFolder
from tests.harness import start_server

LIMIT = 60.0
"""Seconds after which a test has failed; nothing here takes ten."""
Body = Callable[..., int]


def ranks_of(rank: int, world: int) -> Ranks:
    """As a launcher on this machine would have started them."""
    return Ranks(rank, rank, world, world, "python", LOCALHOST, 0)


@contextlib.contextmanager
def ranks(body: Body, world: int, path: Path, hang_seconds: float = 0.0, **more: Any) -> Iterator[list[ForkServerProcess]]:
    """Processes that each run `body(watch, rank, folder, **more)` as the training loop would; it returns the signal that stopped it."""
    start_server()
    folder = RunFolder(path)
    folder.logs.mkdir(parents=True)
    run_folder.start(folder, layout="", precision="", steps=0)
    context = multiprocessing.get_context("forkserver")
    begun = [context.Process(target=_rank, args=(body, rank, world, path, hang_seconds, more), daemon=True) for rank in range(world)]
    for process in begun:
        process.start()
    try:
        yield begun
    finally:
        for process in begun:
            process.kill()
            process.join()


def _rank(body: Body, rank: int, world: int, path: Path, hang_seconds: float, more: dict[str, Any]) -> None:
    import torch

    from parallel import distributed

    gc.freeze()
    torch.set_num_threads(1)
    os.dup2(os.open(path / f"stderr_{rank}", os.O_WRONLY | os.O_CREAT), 2)
    folder, status, stopped = RunFolder(path), FAILED, 0
    logging.basicConfig(filename=folder.rank_log(rank))
    try:
        with watchdog(ranks_of(rank, world), path, hang_seconds, Parents("python")) as watch:
            distributed.start(rank, world, rank, f"file://{path / 'rendezvous'}")
            try:
                leave_when_asked()
                if rank == 0:  # run.json names rank 0's process
                    run_folder.start(folder, layout="", precision="", steps=0)
                with watch.together(folder):
                    stopped = body(watch, rank, path, **more)
                status = INTERRUPTED if stopped else FINISHED
            except SystemExit:
                status = INTERRUPTED
                raise
            finally:
                if rank == 0:
                    run_folder.end(folder, status, watch.reason)
    except Lost as lost:
        os.write(2, f"error  {lost}\n".encode() if str(lost) else b"")
        sys.exit(lost.code)
    sys.exit(SIGNALLED + stopped if stopped else 0)


def steps(watch: Watchdog, rank: int, path: Path, until: int = 1_000_000) -> int:
    """Steps, one all-reduce each, until a signal; then a file that says how many."""
    stop = watch.note_signals()
    step = found = 0
    while step < until and not (found := stop.agreed()):
        step += 1
        watch.progress.stepping(step)
        (path / f"step_{rank}").write_text(str(step))
        time.sleep(0.01)
    (path / f"saved_{rank}").write_text(str(step))
    return found


def wait_for(*paths: Path) -> None:
    """Until all these files are there."""
    deadline = time.monotonic() + LIMIT
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, [path.name for path in paths if not path.exists()]
        time.sleep(0.02)


def codes(begun: list[ForkServerProcess]) -> list[int | None]:
    """The exit codes, once all have ended."""
    deadline = time.monotonic() + LIMIT
    for process in begun:
        process.join(max(0.0, deadline - time.monotonic()))
    return [process.exitcode for process in begun]
