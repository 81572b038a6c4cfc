"""What one rank raises, all ranks raise: for work between two collectives that may fail on some ranks only."""
# MERGED-DOC """What the first rank of a group decides and the others carry out: lists of whole numbers, in one broadcast where they are short.
# MERGED-DOC
# MERGED-DOC A blocking collective on the current stream, like those of parallel/collectives.py; NCCL was not run.
# MERGED-DOC """

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel import distributed
from parallel.distributed import device
from parallel.errors import Mistake
from parallel.grid import Grid

HEAD = 256
"""Numbers of the broadcast that every order has; what a longer one has more comes in a second."""


def broadcast_ints(lists: Sequence[Sequence[int]], group: ProcessGroup) -> None:
    """From the group's first rank to all others, each of which is in `hear`. Collective."""
    sizes, numbers = [len(numbers) for numbers in lists], [number for numbers in lists for number in numbers]
    message = [2 + len(sizes) + len(numbers), len(sizes), *sizes, *numbers]
    padded = message + [0] * (HEAD - len(message))
    sent = torch.tensor(padded, dtype=torch.int64, device=device())
    for part in (sent[:HEAD], sent[HEAD:]):
        if len(part):
            dist.broadcast(part, group=group, group_src=0)


def receive_ints(group: ProcessGroup) -> list[list[int]]:
    """What the group's first rank tells. Collective."""
    message = _received(HEAD, group).tolist()
    size, count = message[0], message[1]
    if size > HEAD:
        message += _received(size - HEAD, group).tolist()
    found, at = [], 2 + count
    for length in message[2 : 2 + count]:
        found.append(message[at : at + length])
        at += length
    return found


def _received(size: int, group: ProcessGroup) -> Tensor:
    numbers = torch.empty(size, dtype=torch.int64, device=device())
    dist.broadcast(numbers, group=group, group_src=0)
    return numbers


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
    told = all_gather_objects((isinstance(error, Mistake), f"{type(error).__name__}: {error}", str(error)) if error else None, grid)
    if error:
        raise error
    for rank, failure in enumerate(told):
        if failure is not None:
            is_mistake, text, words = failure
            raise Mistake(words) if is_mistake else RuntimeError(f"rank {rank} failed: {text}")


def all_gather_objects(value: Any, grid: Grid) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank. Small things that are no tensors. Collective."""
    told = [value] * grid.world
    if grid.world > 1:
        dist.all_gather_object(told, value)
    return told


def gather_objects(value: Any, grid: Grid) -> list[Any]:
    """Every rank's `value`, in rank order, on rank 0; an empty list elsewhere. Collective."""
    told: list[Any] = [value] if grid.world == 1 else [None] * grid.world if grid.rank == 0 else []
    if grid.world > 1:
        dist.gather_object(value, told or None)
    return told


def broadcast_object(value: str) -> str:
    """Rank 0's string, on every rank. Collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=distributed.device())
    return box[0]
