"""Activation recomputation: less memory for more work, by `torch.utils.checkpoint` inside the block, the same in both engines.

Stateless dropout needs no generator to be put back, so nothing is saved but the block's input.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A constructor like `make` whose modules keep only their inputs and run forward again in the backward pass."""

    def build(*arguments: Any, **settings: Any) -> nn.Module:
        module = make(*arguments, **settings)
        module.forward = rerun(module.forward)
        return module

    return build


def rerun(forward: Callable) -> Callable:
    """`forward`, computed again in the backward pass (non-reentrant: integer inputs are welcome, collectives are issued again)."""
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)
