"""What the first rank of a group decides and the others carry out: lists of whole numbers, in one broadcast where they are short.

A blocking collective on the current stream, like those of parallel/collectives.py; NCCL was not run.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel.distributed import device

HEAD = 256
"""Numbers of the broadcast that every order has; what a longer one has more comes in a second."""


def tell(lists: Sequence[Sequence[int]], group: ProcessGroup) -> None:
    """From the group's first rank to all others, each of which is in `hear`. Collective."""
    sizes, numbers = [len(numbers) for numbers in lists], [number for numbers in lists for number in numbers]
    message = [2 + len(sizes) + len(numbers), len(sizes), *sizes, *numbers]
    padded = message + [0] * (HEAD - len(message))
    sent = torch.tensor(padded, dtype=torch.int64, device=device())
    for part in (sent[:HEAD], sent[HEAD:]):
        if len(part):
            dist.broadcast(part, group=group, group_src=0)


def hear(group: ProcessGroup) -> list[list[int]]:
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
