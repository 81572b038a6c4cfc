"""Records per parameter whether this rank's own gradients were finite, before the ranks sum them: which rank produced the NaN.

After data ranks have reduced their gradients, all of them hold the same NaN, and its origin cannot be seen any more. So each
parameter's gradient is summed into one number as it arrives: one more read of the gradients per backward pass, no synchronisation.

At the end of the step, or of the backward pass, one kernel could do this for all parameters, but then it is too late: ZeRO sums over
ranks, in place, as soon as a bucket is full. So it costs one small kernel per parameter and backward pass, and the sums are added up
only when somebody asks.
"""

import itertools
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn


class NonFiniteGradients:
    """Watches the gradients of a rank's parameters (by logical name) from its construction on. Not collective. Read after a failed step."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.names = list(parameters)
        self._sums: list[list[Tensor]] = [[] for _ in self.names]
        """For each parameter, the sum of its gradient in every backward pass since `clear`: 0-dim fp32 tensors on the device."""
        for sums, parameter in zip(self._sums, parameters.values(), strict=True):
            parameter.register_hook(partial(_keep_sum, sums))

    def clear(self) -> None:
        """Forgets the gradients so far. Call at the beginning of a step."""
        for sums in self._sums:
            sums.clear()

    def found(self) -> list[str]:
        """Names of the parameters with a non-finite gradient since `clear`, in the order of the layers. Waits for the device."""
        flat = [total for sums in self._sums for total in sums]
        finite = torch.stack(flat).isfinite().tolist() if flat else []  # one copy from the device for all
        ends = list(itertools.accumulate(map(len, self._sums)))
        return [name for name, sums, end in zip(self.names, self._sums, ends, strict=True) if not all(finite[end - len(sums) : end])]


def _keep_sum(sums: list[Tensor], gradient: Tensor) -> None:
    sums.append(gradient.sum(dtype=torch.float32))  # NaN and ±inf persist in the sum, and +inf − inf is NaN
