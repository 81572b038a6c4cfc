"""Sentence embeddings: the hidden states of an encoder, pooled to one vector for each text."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.segments import PADDING
from parallel.errors import Mistake
from parallel.layers import PlainModule

TEXT = 0
"""The segment of a text, whose tokens attend to one another; padding attends to padding alone."""


def mean_pooling(x: Tensor, segments: Tensor) -> Tensor:
    """x 'b s d', segments 'b s' -> 'b d': the mean over the tokens that are no padding."""
    real = (segments != PADDING)[..., None]  # b s 1
    return (x * real).sum(1) / real.sum(1)


def first_pooling(x: Tensor, segments: Tensor) -> Tensor:
    """x 'b s d' -> 'b d': the first token, which is [CLS] where the tokenizer's template puts it there."""
    return x[:, 0]


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": mean_pooling, "first": first_pooling}
"""The names are those of research/cli/embed.py, which imports no torch."""


@torch.inference_mode()
def embed(
    encoder: PlainModule,
    rows: Sequence[Sequence[int]],
    pooling: str = "mean",
    normalize: bool = True,
    batch: int = 32,
    advance: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """A vector for each row of ids, in their order: 'n d' on the CPU, at least fp32.

    `encoder`: research.generation.restore.restored_encoder's, (ids 'b s', segments 'b s') -> (x 'b s d', segments). `normalize`: the
    vectors have length 1. Rows of similar length make a batch of at most `batch`; `advance` is called with the size of each. A vector
    does not depend on the other rows, up to rounding. A Mistake if a vector is not finite.
    """
    device = next(encoder.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    vectors: list[Tensor] = []
    for begin in range(0, len(order), batch):
        part = [rows[i] for i in order[begin : begin + batch]]
        ids, segments = (tensor.to(device) for tensor in padded(part))
        x, *_ = encoder((ids, segments))
        vectors.append(POOLINGS[pooling](x.to(torch.promote_types(x.dtype, torch.float32)), segments).cpu())
        advance(len(part))
    found = torch.cat(vectors)
    if not bool(torch.isfinite(found).all()):
        raise Mistake("the model's hidden states are not finite: it has diverged → take an earlier checkpoint")
    found = F.normalize(found, dim=-1) if normalize else found
    result = torch.empty_like(found)
    result[torch.tensor(order)] = found
    return result


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(ids, segments), 'b s' each: rows of ids, padded with 0 behind their last id, and which of the places are padding."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    segments = torch.full_like(ids, PADDING)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        segments[i, : len(row)] = TEXT
    return ids, segments
