"""Normalisation over the last dim: '… d' -> '… d'."""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from models.config import GPT
from parallel.collectives import copy_to_tensor_ranks
from parallel.slices import Slice, make_parameter


class Norm(nn.Module):
    """What every norm shares: a weight that begins at one and a bias that begins at zero, replicated over tensor ranks.

    Where each tensor rank normalises *other* data (its own heads), the gradient on one rank is a part of the whole:
    `partial_group` names the ranks to sum it over. None where all ranks normalise the same data and have the same gradient.
    """

    def __init__(self, name: str, size: int, model: GPT, partial_group: ProcessGroup | None, bias: bool) -> None:
        super().__init__()
        self.size, self.eps, self.partial_group = (size,), model.norm_eps, partial_group
        self.weight = make_parameter(f"{name}.weight", torch.ones(size), Slice((size,)), 0, 1)
        self.bias = make_parameter(f"{name}.bias", torch.zeros(size), Slice((size,)), 0, 1) if bias else None

    def parameters_in_use(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias), whose gradients are summed over `partial_group`."""
        bias = None if self.bias is None else copy_to_tensor_ranks(self.bias, self.partial_group)
        return copy_to_tensor_ranks(self.weight, self.partial_group), bias


class LayerNorm(Norm):
    """(x − mean)/√(var + eps) · w + b (arXiv:1607.06450); b where the model has biases."""

    def __init__(self, name: str, size: int, model: GPT, partial_group: ProcessGroup | None = None) -> None:
        super().__init__(name, size, model, partial_group, bias=model.bias)

    def forward(self, x: Tensor) -> Tensor:
        """'… d' -> '… d'."""
        return F.layer_norm(x, self.size, *self.parameters_in_use(), self.eps)


class RMSNorm(Norm):
    """x/√(mean(x²) + eps) · w (arXiv:1910.07467)."""

    def __init__(self, name: str, size: int, model: GPT, partial_group: ProcessGroup | None = None) -> None:
        super().__init__(name, size, model, partial_group, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """'… d' -> '… d'."""
        return F.rms_norm(x, self.size, self.parameters_in_use()[0], self.eps)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
