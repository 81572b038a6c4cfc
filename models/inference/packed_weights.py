"""Weights packed for fast products with few rows on a CPU, which is where decoding spends its time. For inference only.

On a GPU, and in precisions for which neither form is made, weights stay as they are. Measurements: benchmarks/generate.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.vocab import VocabParallelEmbedding

FEW = 8
"""The number of rows that oneDNN's blocks are chosen for. These blocks are as good for one row and for a long prompt."""


def pack_weights(module: nn.Module, rows: int, release: bool) -> None:
    """Packs the weight of every sliced linear layer and head of a module for products of up to `rows` rows.

    `release`: free the original weight unless an embedding needs it, so that it is not held twice. Not for a module that uses its
    weights in other ways.
    """
    tables = {id(part.weight) for part in module.modules() if isinstance(part, VocabParallelEmbedding)}
    for part in module.modules():
        if getattr(part, "product", None) is not F.linear or (make := _form(part.weight, rows)) is None:
            continue
        part.product = make(part.weight.detach())
        if release and id(part.weight) not in tables:
            part.weight.data = part.weight.new_empty(0)


def _form(weight: Tensor, rows: int) -> Callable[[Tensor], Callable] | None:
    """The class to pack a weight with, or None if the weight stays as it is."""
    if weight.device.type != "cpu":
        return None
    if weight.dtype == torch.float32 and rows == 1:
        return Columns if weight.shape[0] > weight.shape[1] else None
    can_pack = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    fits = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return Packed if can_pack and fits else None


class Columns:
    """F.linear with a weight stored by columns: a single fp32 row times a weight with more rows than columns takes half as long."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.t().contiguous().t()

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """'… d_in' -> '… d_out', with the packed weight; the argument `weight` is ignored."""
        return F.linear(x, self.weight, bias)


class Packed:
    """F.linear with a weight in oneDNN's blocks, packed once instead of at every call. The operators are those that torch.compile emits."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), FEW)
        self.multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """'… d_in' -> '… d_out', with the packed weight; the argument `weight` is ignored."""
        return self.multiply(x, self.weight, bias, "none", [], "")
