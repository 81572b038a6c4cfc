"""What is seen of a live engine's logits, on every rank: scores and next tokens in the middle of training, without a trace in it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.grid import Grid

Look = Callable[[Tensor], Tensor]
"""logits 'b s v', this rank's rows of the vocabulary -> what is wanted of them, equal on every tensor rank. Collective over these."""


class Kept:
    """Stands for a pipeline's loss function during one pass: keeps what `look` sees, and says a loss of 0."""

    def __init__(self, look: Look) -> None:
        self.look = look
        self.seen: Tensor | None = None
        """None on every stage but the last."""

    def __call__(self, logits: Tensor, labels: Any) -> Tensor:
        """0, a 0-dim fp32 tensor: DeepSpeed adds it to a sum that the next training step sets back."""
        self.seen = self.look(logits)
        return torch.zeros((), device=logits.device)


@contextlib.contextmanager
def instead_of_loss(pipeline: Any, kept: Kept) -> Iterator[None]:
    """Within, a PipelineModule calls `kept` where it would compute its loss."""
    loss, pipeline.loss_fn = pipeline.loss_fn, kept
    try:
        yield
    finally:
        pipeline.loss_fn = loss


def everywhere(seen: Tensor | None, shape: Sequence[int], grid: Grid, device: torch.device) -> Tensor:
    """'…' of `shape` on the last stage of each data rank, None before it -> 'data …' in fp32, equal on every rank. Collective.

    A broadcast along the pipe axis, then an all-gather along the data axis: every rank is in one group of each, and all issue the two
    in this order, on the current stream. Run on gloo; NCCL takes the same calls, and makes a group's communicator at its first use.
    """
    mine = torch.empty(tuple(shape), device=device) if seen is None else seen.to(torch.float32).contiguous()
    if tuple(mine.shape) != tuple(shape):
        raise ValueError(f"what is seen has the shape {tuple(mine.shape)}, {tuple(shape)} was announced")
    if grid.pipe_group is not None:
        dist.broadcast(mine, src=dist.get_process_group_ranks(grid.pipe_group)[-1], group=grid.pipe_group)
    if grid.data_group is None:
        return mine.unsqueeze(0)
    pieces = [torch.empty_like(mine) for _ in range(grid.data)]
    dist.all_gather(pieces, mine, group=grid.data_group)
    return torch.stack(pieces)
