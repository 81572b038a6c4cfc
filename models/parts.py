"""From a model's settings to the classes that carry them out: the registries, and an experiment's own classes beside them."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from models.attention import Attention, Core, DroppingCore
from models.block import RESIDUALS
from models.config import GPT, VARIANT
from models.dropout import Dropout
from models.init import INITS
from models.mlp import MLPS
from models.norm import NORMS
from models.position import POSITIONS, Position
from models.recompute import recomputed
from parallel.errors import Mistake
from parallel.grid import Grid

REGISTRIES: dict[str, dict[str, Any]] = {"norm": NORMS, "position": POSITIONS, "mlp": MLPS, "residual": RESIDUALS, "init": INITS}
"""A setting's name -> its registered classes by value."""


class Parts:
    """Builds the parts of one model on one rank: a norm, a position scheme, an attention, an MLP, each by its logical name.

    `variants` are the classes of the experiment's variant.py by name. A variant has the constructor of what it replaces.
    """

    def __init__(self, model: GPT, grid: Grid, seed: int, variants: Mapping[str, type], recompute: str = "none") -> None:
        self.model, self.grid, self.seed, self.variants, self.recompute = model, grid, seed, variants, recompute
        self.init = self.chosen("init")(model, seed)

    @cached_property
    def kv_group(self) -> ProcessGroup | None:
        """The neighbouring tensor ranks that use the same kv head; None where each rank has kv heads of its own.

        Made by its members alone, when a rank builds its first attention; every stage has one.
        """
        kv_heads, tensor = self.model.num_kv_heads, self.grid.tensor
        if kv_heads % tensor == 0:
            return None
        sharers = tensor // kv_heads
        if tensor % kv_heads or self.model.head_size % sharers:
            raise Mistake(
                f"parallel.tensor = {tensor} does not fit model.num_kv_heads = {kv_heads}: it must divide them, or be a multiple of "
                f"them by which a head's {self.model.head_size} features can be shared"
            )
        first = self.grid.rank - self.grid.tensor_rank % sharers
        return dist.new_group(list(range(first, first + sharers)), use_local_synchronization=True)

    def chosen(self, setting: str) -> Any:
        """The class that `model.<setting>` names."""
        value = getattr(self.model, setting)
        if not value.startswith(VARIANT):
            return REGISTRIES[setting][value]
        name = value.removeprefix(VARIANT)
        if name not in self.variants:
            known = ", ".join(sorted(self.variants)) or "none"
            raise Mistake(f"model.{setting} = {value!r}, but variant.py defines no class {name} → it defines {known}")
        return self.variants[name]

    def norm(self, name: str, size: int) -> nn.Module:
        """A norm of the residual stream."""
        return self.chosen("norm")(name, size, self.model, self.grid.region.partial_group)

    def head_norm(self, name: str) -> nn.Module:
        """A norm of each head's features: inside a sliced region, so every tensor rank sees other heads."""
        return self.chosen("norm")(name, self.model.head_size, self.model, self.grid.tensor_group)

    def residual_dropout(self, name: str) -> nn.Module:
        """Dropout of what the branch `name` adds to the residual stream."""
        return Dropout(f"{name}.residual", self.model.residual_dropout, self.seed, self.grid)

    def position(self, name: str) -> nn.Module:
        """The position scheme inside attention: the model's own, or none where that acts at the input."""
        scheme = self.chosen("position")
        return (Position if scheme.at_input else scheme)(name, self.model, self.init, self.grid)

    def attention(self, name: str) -> nn.Module:
        """Causal self-attention."""
        return Attention(name, self)

    def attention_core(self, name: str) -> nn.Module:
        """softmax(q kᵀ) v: fused, or written out where probabilities are dropped; rerun in the backward pass if selected."""
        kind = DroppingCore if self.model.attention_dropout else Core
        make = recomputed(kind) if self.recompute == "selective" else kind
        return make(name, self.model.attention_dropout, self.seed, self.grid)

    def mlp(self, name: str) -> nn.Module:
        """The feed-forward half of a block."""
        return self.chosen("mlp")(name, self.model, self.init, self.grid)
