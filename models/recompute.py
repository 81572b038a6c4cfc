"""Activation recomputation (gradient checkpointing): less memory for more work, by `torch.utils.checkpoint` inside the block.

It is the same in both engines. Dropout is stateless, so no generator state is saved: only the inputs of the recomputed module.
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
    """`forward`, run again in the backward pass. Non-reentrant: integer inputs are allowed, and collectives are issued again."""
    return lambda *inputs, **context: checkpoint(forward, *inputs, **context, use_reentrant=False, preserve_rng_state=False)
