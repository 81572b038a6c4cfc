"""From numpy, which research/data speaks, to torch, which the engines speak."""

import torch

from parallel.engine import MicroBatch
from research.data.batches import Batch


def micro_batch(batch: Batch, numbered: bool = False) -> MicroBatch:
    """The same arrays as tensors, memory shared; the samples' numbers go along as context where the model drops anything."""
    ids, targets, weights, samples = (torch.from_numpy(array) for array in batch)
    return MicroBatch(ids, targets, weights, context=(samples,) if numbered else ())
