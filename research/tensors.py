"""From numpy, which research/data speaks, to torch, which the engines speak."""

import torch

from parallel.engine import MicroBatch
from research.data.batches import Batch


def micro_batch(batch: Batch) -> MicroBatch:
    """The same arrays as tensors, memory shared."""
    return MicroBatch(*(torch.from_numpy(array) for array in batch))
