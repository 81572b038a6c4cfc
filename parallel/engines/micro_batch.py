"""The input of one forward pass, and its copy to the device while the passes before it are computed."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

COPIED_AHEAD = 2
"""Micro-batches whose copies to the device are under way while one is computed."""
NO_CONTEXT: Mapping[str, Any] = MappingProxyType({})


class MicroBatch(NamedTuple):
    """The input of one pass: ids 'b s' int64, and the labels that the loss takes beside the logits.

    `context` holds integer tensors that travel beside x through all layers, by name: `samples` 'b', the sample numbers, for dropout.
    """

    ids: Tensor
    labels: tuple[Tensor, ...]
    context: Mapping[str, Tensor] = NO_CONTEXT

    @classmethod
    def of(cls, ids: np.ndarray, labels: Sequence[np.ndarray], context: Mapping[str, np.ndarray] = NO_CONTEXT) -> "MicroBatch":
        """The same arrays as tensors, memory shared."""
        tensors = {name: torch.from_numpy(array) for name, array in context.items()}
        return cls(torch.from_numpy(ids), tuple(map(torch.from_numpy, labels)), tensors)

    def on(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on `device`. It is copied to a GPU from pinned memory, so that the host does not wait for the copy."""

        def there(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor
            return pinned.to(device, non_blocking=True)

        context = {name: there(tensor) for name, tensor in self.context.items()}
        return MicroBatch(there(self.ids), tuple(map(there, self.labels)), context)

    def inputs(self, names: Sequence[str]) -> Tensor | tuple[Tensor, ...]:
        """The first layer's input: ids, or ids followed by the context tensors `names`, which are those that its list of layers has."""
        return (self.ids, *(self.context[name] for name in names)) if names else self.ids


def copied_ahead(batches: Iterable[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """The micro-batches on `device`, in order. Each is read, and its copy begun, while the COPIED_AHEAD in front of it are computed."""
    waiting: deque[MicroBatch] = deque()
    for batch in batches:
        waiting.append(batch.on(device))
        if len(waiting) > COPIED_AHEAD:
            yield waiting.popleft()
    yield from waiting
