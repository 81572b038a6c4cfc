"""Registries of norms, position schemes, MLPs and initialisations, and the context that layers are built with."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from models.config import chosen
from models.encoder_config import AnyModel
from models.init import INITS
from models.mlp import MLPS
from models.norm import NORMS
from models.position import POSITIONS
from parallel.errors import Mistake
from parallel.grid import Grid, neighbours_group
from parallel.region import region_of

REGISTRIES: dict[str, dict[str, Any]] = {"norm": NORMS, "position": POSITIONS, "mlp": MLPS, "init": INITS}
"""Setting -> {its value: the registered class}."""


class BuildContext:
    """What the layers of a model are built with on one rank: settings, grid, seed, recomputation, and the classes to use.

    `variants`: the classes of the experiment's variant.py by name. A variant has the same constructor as the class it replaces.
    Collective where ranks share a kv head: all ranks of the world then create the groups of those ranks.
    """

    def __init__(self, model: AnyModel, grid: Grid, seed: int, variants: Mapping[str, type], recompute: str = "none") -> None:
        self.model, self.grid, self.seed, self.variants, self.recompute = model, grid, seed, variants, recompute
        self.init = self.chosen("init")(model, seed)
        self.kv_group: ProcessGroup | None = neighbours_group(grid, kv_sharers(model, grid.tensor))
        """The neighbouring tensor ranks that use the same kv head; None where each rank has its own kv heads."""

    def chosen(self, setting: str, registered: Mapping[str, Any] | None = None) -> Any:
        """The class that `model.<setting>` names: a variant, or a class of `registered` (default: the registry of that setting)."""
        return chosen(f"model.{setting}", getattr(self.model, setting), registered or REGISTRIES[setting], self.variants)

    def norm(self, name: str, size: int) -> nn.Module:
        """A norm of the residual stream. Under sequence parallelism its gradients are partial sums, one per tensor rank."""
        return self.chosen("norm")(name, size, self.model, region_of(self.grid).partial_group)


def kv_sharers(model: AnyModel, tensor: int) -> int:
    """The number of tensor ranks that share a kv head: 1 where each rank has its own ones. A Mistake if the two do not fit."""
    kv_heads = model.num_kv_heads
    if kv_heads % tensor == 0:
        return 1
    sharers = tensor // kv_heads
    if tensor % kv_heads or model.head_size % sharers:
        raise Mistake(
            f"parallel.tensor = {tensor} does not fit model.num_kv_heads = {kv_heads}: it must divide them, or be a multiple of "
            f"them by which a head's {model.head_size} features can be shared"
        )
    return sharers
