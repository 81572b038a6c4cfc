"""Saves an engine between two steps: on the calling thread, or from a copy on a thread of its own while training goes on."""

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.checkpoint.sharding import assign_writers, gather_shards, parts_of
from parallel.checkpoint.writer import Saved, Writing
from parallel.distributed import device
from parallel.engines.engine import Engine
from parallel.engines.optimizer_state import counters, ensure_moments
from parallel.engines.process_state import arithmetic, generators
from parallel.grid import Grid

TOLD_HERE = ("layout", "machine", "counters")
"""Facts that the engine itself tells."""


class Saver:
    """Saves on the calling thread: when `save` returns, the checkpoint is there. Every method is collective over all ranks."""

    def __init__(self) -> None:
        self._published: list[Saved] = []

    def save(self, folder: Path, engine: Engine, facts: dict[str, Any]) -> None:
        """Saves `engine` as `folder`, which all ranks share; the same folder saved before is replaced. `latest` beside it names it then.

        `facts`: the caller's own, for the manifest: `step` must be among them, layout, machine and counters (told by the engine)
        must not. A Mistake on all ranks where one of them cannot write; nothing is left of the checkpoint then.
        Takes, besides the engine, at most one parameter's slice and 128 MiB on each rank. One saver at a time writes beside `folder`.
        """
        writing, tensors = start_transfer(folder, engine, facts)
        for tensor in tensors:
            writing.write(tensor)
        self._published.append(writing.published())

    def poll(self) -> list[Saved]:
        """What has been published since the last call, oldest first. All ranks call it after the same step."""
        published, self._published = self._published, []
        return published

    def wait(self) -> list[Saved]:
        """As `poll`, once all that was begun is published: the last call of a run."""
        return self.poll()


class BackgroundSaver(Saver):
    """Copies this rank's share into host memory, then writes it on a thread of its own while training goes on.

    The copy takes 12 bytes for every parameter of the model, shared out over all ranks, until it is written. The checkpoint is
    published, or its error raised, by the first `poll`, `wait` or `save` that finds the writers of all ranks at their end;
    the thread itself takes part in no collective. A process that ends before leaves a hidden folder, which the next save removes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._writing: tuple[Writing, threading.Thread] | None = None

    def save(self, folder: Path, engine: Engine, facts: dict[str, Any]) -> None:
        """See Saver. Returns when the state is copied and may change; waits for an earlier checkpoint first."""
        self._finish()
        writing, tensors = start_transfer(folder, engine, facts)
        thread = threading.Thread(target=_write, args=(_copies(tensors, writing), writing), daemon=True)
        self._writing = writing, thread
        thread.start()

    def poll(self) -> list[Saved]:
        """See Saver. While a checkpoint is being written, every call all-reduces one number."""
        if self._writing is not None:
            writing, thread = self._writing
            if _everywhere(not thread.is_alive(), writing.grid):
                self._finish()
        return super().poll()

    def wait(self) -> list[Saved]:
        """See Saver."""
        self._finish()
        return super().poll()

    def _finish(self) -> None:
        if self._writing is not None:
            (writing, thread), self._writing = self._writing, None
            thread.join()
            self._published.append(writing.published())


def start_transfer(folder: Path, engine: Engine, facts: dict[str, Any]) -> tuple[Writing, Iterable[Tensor]]:
    """A checkpoint of `engine` that is ready to be written, and the tensors to write, in order. Collective, and so is walking them."""
    step = facts.get("step")
    if not isinstance(step, int) or set(TOLD_HERE) & set(facts):
        raise ValueError(f"a checkpoint's facts have a step, which is {step!r}, and none of {', '.join(TOLD_HERE)}")
    ensure_moments(engine)
    shares = assign_writers(engine)
    told = {**facts, "counters": counters(engine), **arithmetic(engine)}
    writing = Writing(folder, parts_of(engine, shares), told, engine.grid, generators())
    return writing, gather_shards(engine, shares)


def _copies(tensors: Iterable[Tensor], writing: Writing) -> list[Tensor]:
    """The last tensor first. A copy that there is no memory for is an error of the writing: the walk goes on, since others walk along."""
    copies: list[Tensor] = []
    for tensor in tensors:
        with writing.remembering():
            copies.append(tensor.clone())
    return copies[::-1]


def _write(copies: list[Tensor], writing: Writing) -> None:
    while copies:
        writing.write(copies.pop())  # each copy's memory is given back as it is written


def _everywhere(here: bool, grid: Grid) -> bool:
    """Whether it is so on every rank. Collective."""
    flag = torch.tensor(int(here), device=device())
    if grid.world > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)
