"""Weights laid out anew for products with few rows on a CPU, which is what decoding spends its time on. Inference only.

A GPU's kernels take weights as they are, and so do types that neither form is for. Figures: benchmarks/generate.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.vocab import VocabParallelEmbedding

FEW = 8
"""Rows of a product that oneDNN's blocks are chosen for. They serve one row and a long prompt as well."""


def pack_weights(module: nn.Module, rows: int, release: bool) -> None:
    """Gives every sliced linear layer and head of a module its weight in a form that is fast for products of up to `rows` rows.

    `release`: the weight itself is let go of where no embedding looks rows up in it, so that it is not held twice. Not for a
    module that has other uses of its weights.
    """
    tables = {id(part.weight) for part in module.modules() if isinstance(part, VocabParallelEmbedding)}
    for part in module.modules():
        if getattr(part, "product", None) is not F.linear or (make := _form(part.weight, rows)) is None:
            continue
        part.product = make(part.weight.detach())
        if release and id(part.weight) not in tables:
            part.weight.data = part.weight.new_empty(0)


def _form(weight: Tensor, rows: int) -> Callable[[Tensor], Callable] | None:
    if weight.device.type != "cpu":
        return None
    if weight.dtype == torch.float32 and rows == 1:
        return Columns if weight.shape[0] > weight.shape[1] else None
    packs = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    fits = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return Packed if packs and fits else None


class Columns:
    """F.linear with a weight stored column after column: a single fp32 row times a high matrix takes half as long."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.t().contiguous().t()

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """'… d_in' -> '… d_out', with the weight that it was made of."""
        return F.linear(x, self.weight, bias)


class Packed:
    """F.linear with a weight in oneDNN's blocks, put so once instead of at every call. The operators are those that torch.compile emits."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), FEW)
        self.multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """'… d_in' -> '… d_out', with the weight that it was made of."""
        return self.multiply(x, self.weight, bias, "none", [], "")
