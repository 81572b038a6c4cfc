"""Cross entropy and argmax over logits whose vocabulary is sliced over tensor ranks. The logits are never gathered."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

LOGITS_AT_ONCE = {"cpu": 2**19, "cuda": 2**26}
"""Number of logits whose exponentials are held in fp32 at a time, by device: few enough for a CPU's cache (2 MiB) and a GPU's spare
memory (256 MiB, in which a GPU needs few kernels; smaller blocks would cost hundreds of them)."""
BY_DEVICE = 0
"""As `logits_at_once`: the number that LOGITS_AT_ONCE has for the logits' device."""


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    group: ProcessGroup | None,
    vocab_size: int,
    label_smoothing: float = 0.0,
    logits_at_once: int = BY_DEVICE,
) -> Tensor:
    """−log p(target) per token, as F.cross_entropy(…, reduction="none"); equal on every tensor rank, fp32 (fp64 for fp64 logits).

    logits: 'b s v', this rank's rows of the padded vocabulary, neither gathered nor written to; targets: 'b s' in [0, vocab_size).
    Two all-reduces of O(b·s): the maximum, then three stacked sums. Label smoothing ε mixes in the mean over the
    *whole, unpadded* vocabulary: (1 − ε)·nll − ε/V · Σ_v log p_v (NVIDIA/Megatron-LM#737 takes the mean over a rank's own rows).

    Rows are processed in blocks of about `logits_at_once` logits, at least one row at a time.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    loss = _CrossEntropy.apply(flat, targets.reshape(-1), group, vocab_size, label_smoothing, logits_at_once)
    return loss.view(targets.shape)


def vocab_parallel_argmax(logits: Tensor, group: ProcessGroup | None, vocab_size: int) -> Tensor:
    """The id of the largest logit, the lowest id of equal ones: 'b s v', this rank's rows -> 'b s' int64, equal on every tensor rank.

    Two all-reduces of O(b·s): the maximum, then the lowest id that has it. Padding is never chosen. There is no gradient.
    """
    flat, start, real = logits.detach().reshape(-1, logits.shape[-1]), *_own_columns(logits, group, vocab_size)
    highest = _maximum(flat, real, group)
    ids = torch.full(highest.shape, vocab_size, dtype=torch.int64, device=logits.device)
    if real:
        own = flat[:, :real].max(1)
        ids = torch.where(own.values == highest, own.indices + start, ids)
    if group is not None:
        dist.all_reduce(ids, op=dist.ReduceOp.MIN, group=group)
    return ids.view(logits.shape[:-1])


def _own_columns(logits: Tensor, group: ProcessGroup | None, vocab_size: int) -> tuple[int, int]:
    """The id of this rank's first column, and how many of its columns are vocabulary, not padding."""
    start = 0 if group is None else group.rank() * logits.shape[-1]
    return start, max(0, min(vocab_size - start, logits.shape[-1]))


class _CrossEntropy(torch.autograd.Function):
    """Saves the logits themselves and one number per token; the backward pass computes the probabilities again."""

    @staticmethod
    def forward(ctx, logits, targets, group, vocab_size, smoothing, logits_at_once):
        start, real = _own_columns(logits, group, vocab_size)
        local = targets - start
        inside = (local >= 0) & (local < real)
        local = local.clamp(0, max(real - 1, 0))

        highest = _maximum(logits, real, group)
        summed, total = _sums(logits, real, highest, smoothing, logits_at_once)
        target = (logits.gather(1, local.unsqueeze(1)).squeeze(1) - highest).masked_fill(~inside, 0.0)
        sums = torch.stack([summed, target, total])
        if group is not None:
            dist.all_reduce(sums, group=group)
        ctx.save_for_backward(logits, local, inside, highest, sums[0])
        ctx.real, ctx.vocab_size, ctx.smoothing, ctx.logits_at_once = real, vocab_size, smoothing, logits_at_once
        return sums[0].log() - (1 - smoothing) * sums[1] - smoothing / vocab_size * sums[2]

    @staticmethod
    def backward(ctx, gradient):
        logits, local, inside, highest, summed = ctx.saved_tensors
        grad = torch.zeros_like(logits) if ctx.real < logits.shape[1] else torch.empty_like(logits)
        at_target = gradient.masked_fill(~inside, 0.0) * -(1 - ctx.smoothing)
        scale = gradient / summed
        for rows in _row_blocks(logits, ctx.logits_at_once) if ctx.real else ():
            p = (logits[rows, : ctx.real] - highest[rows, None]).exp_().mul_(scale[rows, None])
            if ctx.smoothing:
                p.sub_(ctx.smoothing / ctx.vocab_size * gradient[rows, None])
            p.scatter_add_(1, local[rows, None], at_target[rows, None])
            grad[rows, : ctx.real] = p
        return grad, None, None, None, None, None


def _row_blocks(logits: Tensor, logits_at_once: int) -> list[slice]:
    size = max(1, (logits_at_once or LOGITS_AT_ONCE[logits.device.type]) // logits.shape[1])
    return [slice(i, i + size) for i in range(0, len(logits), size)]


def _maximum(logits: Tensor, real: int, group: ProcessGroup | None) -> Tensor:
    """The largest real logit of each row over all ranks, at least fp32; a rank that holds only padding contributes −∞."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    highest = logits[:, :real].amax(1).to(dtype) if real else logits.new_full((len(logits),), -torch.inf, dtype=dtype)
    if group is not None:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    return highest


def _sums(logits: Tensor, real: int, highest: Tensor, smoothing: float, logits_at_once: int) -> tuple[Tensor, Tensor]:
    """Per row: Σ exp(logit − highest) and, where smoothing needs it, Σ (logit − highest); over this rank's real columns.

    Logits are taken relative to the highest one, so that a large common offset costs no precision.
    """
    summed, total = torch.zeros_like(highest), torch.zeros_like(highest)
    for rows in _row_blocks(logits, logits_at_once) if real else ():
        below = logits[rows, :real] - highest[rows, None]  # promotes: never in low precision
        if smoothing:
            total[rows] = below.sum(1)
        summed[rows] = below.exp_().sum(1)
    return summed, total
