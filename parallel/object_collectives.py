"""Collectives for values that are not tensors: all-gather, gather and broadcast of objects, broadcast of integer lists, shared errors.

The values travel in host memory, over gloo on every device (parallel/distributed.py): the GPU is not waited for. All calls block.
"""

import contextlib
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from parallel.errors import Mistake, SharedMistake
from parallel.grid import Grid

HEAD = 256
"""Integers in the first broadcast of every message. A longer message sends the rest in a second broadcast."""


def all_gather_objects(value: Any, grid: Grid) -> list[Any]:
    """Every rank's `value` in rank order, on every rank. `value` is small and picklable. Collective over all ranks."""
    values = [value] * grid.world
    if grid.world > 1:
        dist.all_gather_object(values, value)
    return values


def gather_objects(value: Any, grid: Grid) -> list[Any]:
    """Every rank's `value` in rank order, on rank 0; an empty list on the other ranks. Collective over all ranks."""
    values: list[Any] = [value] if grid.world == 1 else [None] * grid.world if grid.rank == 0 else []
    if grid.world > 1:
        dist.gather_object(value, values or None)
    return values


def broadcast_object(value: str) -> str:
    """Rank 0's string, on every rank. Collective over all ranks."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


@contextlib.contextmanager
def together(grid: Grid) -> Iterator[None]:
    """Runs the `with` block on every rank; if it raised on any rank, every rank raises. Collective at the end of the block.

    The block itself must not issue a collective. Every rank raises the error of the first failed rank: a SharedMistake with its exit
    code that names the rank and its host, unless it is rank 0's, or a RuntimeError that names both, where a rank that failed itself
    raises its own error. Without this, the other ranks would wait in their next collective for a rank that has left.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    code = error.code if isinstance(error, Mistake) else 0
    own = (code, f"{type(error).__name__}: {error}", str(error), socket.gethostname()) if error else None
    failures = all_gather_objects(own, grid)
    if grid.world == 1 and error:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            code, text, sentence, host = failure
            if code:
                shared = f"(rank {rank} on {host}) {sentence}" if rank else sentence
                raise SharedMistake(shared, reports=grid.rank == 0, code=code) from error
            raise error or RuntimeError(f"rank {rank} on {host} failed: {text}")


def broadcast_ints(lists: Sequence[Sequence[int]], group: ProcessGroup) -> None:
    """Sends lists of integers from the group's first rank, which calls this, to the others, which call `receive_ints`. Collective.

    The message is [its length, number of lists, size of each list, all numbers], in one broadcast of HEAD int64 if it fits.
    """
    sizes, numbers = [len(numbers) for numbers in lists], [number for numbers in lists for number in numbers]
    message = [2 + len(sizes) + len(numbers), len(sizes), *sizes, *numbers]
    message += [0] * (HEAD - len(message))
    tensor = torch.tensor(message, dtype=torch.int64)
    for part in (tensor[:HEAD], tensor[HEAD:]):
        if len(part):
            dist.broadcast(part, group=group, group_src=0)


def receive_ints(group: ProcessGroup) -> list[list[int]]:
    """The lists that the group's first rank sends with `broadcast_ints`. Collective."""

    def receive(size: int) -> list[int]:
        numbers = torch.empty(size, dtype=torch.int64)
        dist.broadcast(numbers, group=group, group_src=0)
        return numbers.tolist()

    message = receive(HEAD)
    length, count = message[:2]
    if length > HEAD:
        message += receive(length - HEAD)
    lists, start = [], 2 + count
    for size in message[2 : 2 + count]:
        lists.append(message[start : start + size])
        start += size
    return lists
