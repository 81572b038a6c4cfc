"""Records per parameter whether this rank's own gradients were finite, before the ranks sum them: which rank produced the NaN.

After data ranks have reduced their gradients, all of them hold the same NaN, and its origin cannot be seen any more. So each
parameter's gradient is summed into one number as it arrives: one more read of the gradients per backward pass, no synchronisation.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn


class NonFiniteGradients:
    """Watches the gradients of a rank's parameters (by logical name) from its construction on. Not collective. Read after a failed step."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], device: torch.device) -> None:
        self.names = list(parameters)
        self._sums = torch.zeros(len(self.names), device=device)
        for i, parameter in enumerate(parameters.values()):
            parameter.register_hook(partial(self._add, i))

    def _add(self, i: int, gradient: Tensor) -> None:
        self._sums[i] += gradient.sum(dtype=torch.float32)  # NaN and ±inf persist in the sum, and +inf − inf is NaN

    def clear(self) -> None:
        """Forgets the gradients so far. Call at the beginning of a step."""
        self._sums.zero_()

    def found(self) -> list[str]:
        """Names of the parameters with a non-finite gradient since `clear`, in the order of the layers. Waits for the device."""
        finite = self._sums.isfinite().tolist()
        return [name for name, fine in zip(self.names, finite, strict=True) if not fine]
