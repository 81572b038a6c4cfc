"""What one rank raises, all ranks raise: for work between two collectives that may fail on some ranks only."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from parallel.errors import Mistake
from parallel.grid import Grid


@contextlib.contextmanager
def together(grid: Grid) -> Iterator[None]:
    """Runs its body, which issues no collective, on every rank; if it raised on any, every rank raises. Collective at its end.

    A rank that failed raises its own error; the others that of the first rank that did, a Mistake with its words or a
    RuntimeError that names it. Without this they would wait in their next collective for one that has left.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    told = everyone((isinstance(error, Mistake), f"{type(error).__name__}: {error}", str(error)) if error else None, grid)
    if error:
        raise error
    for rank, failure in enumerate(told):
        if failure is not None:
            is_mistake, text, words = failure
            raise Mistake(words) if is_mistake else RuntimeError(f"rank {rank} failed: {text}")


def everyone(value: Any, grid: Grid) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank. Small things that are no tensors. Collective."""
    told = [value] * grid.world
    if grid.world > 1:
        dist.all_gather_object(told, value)
    return told


def on_first(value: Any, grid: Grid) -> list[Any]:
    """Every rank's `value`, in rank order, on rank 0; an empty list elsewhere. Collective."""
    told: list[Any] = [value] if grid.world == 1 else [None] * grid.world if grid.rank == 0 else []
    if grid.world > 1:
        dist.gather_object(value, told or None)
    return told
