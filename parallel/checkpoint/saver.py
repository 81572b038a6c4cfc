"""Saves an engine between two steps: `Saver` on the calling thread, `BackgroundSaver` from a copy on another thread during training."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.checkpoint.sharding import AHEAD, assign_writers, gather_shards, parts_of
from parallel.checkpoint.writer import BYTES_PER_FILE, CheckpointWriter, Saved
from parallel.engines.engine import Engine
from parallel.engines.optimizer_state import counters, ensure_moments
from parallel.engines.process_state import arithmetic, generators

ENGINE_FACTS = ("layout", "machine", "counters")
"""Facts that are taken from the engine; the caller must not give them."""


class Saver:
    """Saves on the calling thread: the checkpoint exists when `save` returns. Every method is collective over all ranks.

    A file has at most `bytes_per_file` bytes unless it holds a single part that is larger. A rank may receive `ahead` bytes of slices
    before it writes them.
    """

    def __init__(self, bytes_per_file: int = BYTES_PER_FILE, ahead: int = AHEAD, check: Callable[[], None] = lambda: None) -> None:
        """`check` is called by rank 0 before it begins a checkpoint and before it publishes it."""
        self.bytes_per_file, self.ahead, self.check = bytes_per_file, ahead, check
        self._published: list[Saved] = []

    def save(self, folder: Path, engine: Engine, facts: dict[str, Any]) -> None:
        """Saves `engine` as `folder`, on a disk that all ranks share, replaces an older one of that name, and points `latest` at it.

        `facts` are the caller's own entries of the manifest: they include `step`, but not layout, machine and counters, which are
        taken from the engine. If one rank cannot write, all ranks raise a Mistake and nothing is left of the checkpoint.
        Besides the engine, each rank needs memory for one parameter's slice and `ahead` bytes. Only one saver may write beside `folder`.
        """
        writer, tensors = self._start_transfer(folder, engine, facts)
        for tensor in tensors:
            writer.write(tensor)
        self._published.append(writer.finish())

    def poll(self) -> list[Saved]:
        """The checkpoints published since the last call, oldest first. All ranks call it after the same step."""
        published, self._published = self._published, []
        return published

    def wait(self) -> list[Saved]:
        """Waits until every checkpoint is published, then returns as `poll` does. The last call of a run."""
        return self.poll()

    def _start_transfer(self, folder: Path, engine: Engine, facts: dict[str, Any]) -> tuple[CheckpointWriter, Iterable[Tensor]]:
        """The writer of a checkpoint of `engine`, and the tensors to write, in order. Collective, and so is iterating over the tensors."""
        step = facts.get("step")
        if not isinstance(step, int) or set(ENGINE_FACTS) & set(facts):
            raise ValueError(f"a checkpoint's facts have a step, which is {step!r}, and none of {', '.join(ENGINE_FACTS)}")
        ensure_moments(engine)
        shards = assign_writers(engine)
        facts = {**facts, "counters": counters(engine), **arithmetic(engine)}
        writer = CheckpointWriter(folder, parts_of(engine, shards), facts, engine.grid, generators(), self.bytes_per_file, self.check)
        return writer, gather_shards(engine, shards, self.ahead)


class BackgroundSaver(Saver):
    """Copies this rank's share into host memory, then writes it on a separate thread during training.

    The copy takes 12 bytes per parameter of the model, divided among all ranks, until it is written. The checkpoint is published, or
    its error raised, by the first `poll`, `wait` or `save` that finds the threads of all ranks finished; the thread itself issues no
    collective. If a process ends earlier, a hidden folder remains, which the next save removes.
    """

    _writing: tuple[CheckpointWriter, threading.Thread] | None = None

    def save(self, folder: Path, engine: Engine, facts: dict[str, Any]) -> None:
        """See Saver.save. Waits for an earlier checkpoint, then returns as soon as the state is copied and may change."""
        self._finish()
        writer, tensors = self._start_transfer(folder, engine, facts)
        copies: list[Tensor] = []
        for tensor in tensors:  # without memory for a copy the walk goes on, because other ranks walk along
            with writer.keeping_error():
                copies.append(tensor.clone())
        copies.reverse()  # the last tensor first: the thread pops them from the end
        thread = threading.Thread(target=_write, args=(copies, writer), daemon=True)
        self._writing = writer, thread
        thread.start()

    def poll(self) -> list[Saved]:
        """See Saver.poll. While a checkpoint is being written, every call all-reduces one number."""
        if self._writing is not None:
            writer, thread = self._writing
            finished = torch.tensor(int(not thread.is_alive()))  # in host memory: the GPU is not waited for
            if writer.grid.world > 1:
                dist.all_reduce(finished, op=dist.ReduceOp.MIN)
            if finished:
                self._finish()
        return super().poll()

    def wait(self) -> list[Saved]:
        self._finish()
        return super().poll()

    def _finish(self) -> None:
        if self._writing is not None:
            (writer, thread), self._writing = self._writing, None
            thread.join()
            self._published.append(writer.finish())


def _write(copies: list[Tensor], writer: CheckpointWriter) -> None:
    while copies:
        writer.write(copies.pop())  # each copy's memory is freed as it is written
