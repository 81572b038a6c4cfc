"""Whose gradient was it? A note per parameter of whether this rank's own gradients were finite, taken before ranks sum theirs.

Once data ranks have reduced, all of them hold the one NaN; the rank that made it is no longer to be told. So each parameter's
gradient is summed into one number as it arrives: one more read of the gradients in a backward pass, and no synchronisation.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn


class NonFiniteGradients:
    """Watches the gradients of a rank's parameters (by logical name) from now on. No collective; read it when a step has failed."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], device: torch.device) -> None:
        self.names = list(parameters)
        self._sums = torch.zeros(len(self.names), device=device)
        for i, parameter in enumerate(parameters.values()):
            parameter.register_hook(partial(self._add, i))

    def _add(self, i: int, gradient: Tensor) -> None:
        self._sums[i] += gradient.sum(dtype=torch.float32)  # NaN and ±inf stay what they are, and +inf − inf is NaN

    def clear(self) -> None:
        """A step begins."""
        self._sums.zero_()

    def found(self) -> list[str]:
        """Parameters that got a gradient that is not finite since `clear`, in the order of the layers. Waits for the device."""
        finite = self._sums.isfinite().tolist()
        return [name for name, fine in zip(self.names, finite, strict=True) if not fine]
