"""Normalisation layers over the last dim: LayerNorm and RMSNorm. '… d' -> '… d'."""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from models.encoder_config import AnyModel
from parallel.collectives import copy_to_tensor_ranks
from parallel.slices import Slice, make_parameter


class Norm(nn.Module):
    """Base class of norms: a weight initialised to one and a bias initialised to zero, replicated over tensor ranks.

    Where each tensor rank normalises different data (its own heads, or its own part of the sequence), the gradient on one rank
    is only part of the whole gradient, and is summed over the ranks of `partial_group`. `partial_group` is None where all
    ranks normalise the same data and so have the same gradient.
    """

    def __init__(self, name: str, size: int, model: AnyModel, partial_group: ProcessGroup | None, bias: bool) -> None:
        super().__init__()
        self.size, self.eps, self.partial_group = (size,), model.norm_eps, partial_group
        self.weight = make_parameter(f"{name}.weight", torch.ones(size), Slice((size,)), 0, 1)
        self.bias = make_parameter(f"{name}.bias", torch.zeros(size), Slice((size,)), 0, 1) if bias else None

    def parameters_in_use(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias), whose gradients the backward pass sums over `partial_group`. `forward` must use these."""
        bias = None if self.bias is None else copy_to_tensor_ranks(self.bias, self.partial_group)
        return copy_to_tensor_ranks(self.weight, self.partial_group), bias


class LayerNorm(Norm):
    """(x − mean)/√(var + eps) · w + b (arXiv:1607.06450). There is a b only if `model.bias` is True."""

    def __init__(self, name: str, size: int, model: AnyModel, partial_group: ProcessGroup | None = None) -> None:
        super().__init__(name, size, model, partial_group, bias=model.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.size, *self.parameters_in_use(), self.eps)


class RMSNorm(Norm):
    """x/√(mean(x²) + eps) · w (arXiv:1910.07467)."""

    def __init__(self, name: str, size: int, model: AnyModel, partial_group: ProcessGroup | None = None) -> None:
        super().__init__(name, size, model, partial_group, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.size, self.parameters_in_use()[0], self.eps)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
