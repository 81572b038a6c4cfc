"""A norm that normalises nothing: y = w · tanh(α x) + b, with one trained α (arXiv:2503.10622)."""

import torch
from torch import Tensor

from models.config import GPT
from models.norm import Norm
from parallel.collectives import copy_to_tensor_ranks
from parallel.slices import Slice, make_parameter

ALPHA = 0.5


class DynamicTanh(Norm):
    """'… d' -> '… d', elementwise. Has the constructor of every norm, so that it can stand wherever one does."""

    def __init__(self, name: str, size: int, model: GPT, partial_group: torch.distributed.ProcessGroup | None = None) -> None:
        super().__init__(name, size, model, partial_group, bias=model.bias)
        self.alpha = make_parameter(f"{name}.alpha", torch.full((1,), ALPHA), Slice((1,)), 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """'… d' -> '… d'."""
        weight, bias = self.parameters_in_use()
        y = weight * torch.tanh(copy_to_tensor_ranks(self.alpha, self.partial_group) * x)
        return y if bias is None else y + bias
