"""Packed weights give the results of F.linear with the original weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.inference.packed_weights import Columns, Packed, pack_weights
from parallel.grid import Grid
from parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel.vocab import TiedHead, VocabParallelEmbedding, VocabParallelHead
from tests.models.helpers.build import relative

GRID = Grid()
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float64: 1e-15}
"""Relative to the product of the same numbers in fp64. The rounding of bf16 is 2⁻⁹."""


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))


class Parts(nn.Module):
    """One layer of each kind. The tied head uses the embedding's weight."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.high = ColumnParallelLinear("high", 32, (48, 16), True, draw, GRID)
        self.wide = RowParallelLinear("wide", 64, 32, True, draw, GRID)
        self.embedding = VocabParallelEmbedding("embedding", 83, 32, draw, GRID)
        self.tied = TiedHead(self.embedding)
        self.head = VocabParallelHead("head", 83, 32, draw, GRID)
        self.high.bias.data, self.wide.bias.data = draw("bias", (64,)), draw("biases", (32,))
        self.to(dtype)

    def outputs(self, rows: int, rounded: torch.dtype) -> list[torch.Tensor]:
        """The outputs for inputs that `rounded` can represent."""
        x, wide = (draw("x", (rows, 1, width)).to(rounded).to(self.embedding.weight.dtype) for width in (32, 64))
        with torch.inference_mode():
            return [self.high(x), self.wide(wide), self.tied(x), self.head(x), self.embedding(torch.tensor([[1, 82, 5]]))]


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_products_are_the_same(dtype, slots, release):
    parts = Parts(dtype)
    exact = Parts(dtype).double()
    pack_weights(parts, slots, release)
    for rows in (1, 3, 8, 40):
        for found, true in zip(parts.outputs(rows, dtype), exact.outputs(rows, dtype), strict=True):
            assert found.dtype == dtype and found.shape == true.shape
            assert relative(found, true) <= TOLERANCE[dtype]


def test_which_form_is_chosen():
    kinds = {}
    for dtype, slots in ((torch.float32, 1), (torch.float32, 8), (torch.float64, 8)):
        pack_weights(parts := Parts(dtype), slots, release=False)
        kinds[dtype, slots] = [type(part.product) for part in (parts.high, parts.wide, parts.tied, parts.head)]
    plain = type(F.linear)
    assert kinds[torch.float32, 1] == [Columns, plain, Columns, Columns]
    assert kinds[torch.float32, 8] == [Packed] * 4
    assert kinds[torch.float64, 8] == [plain] * 4


def test_a_weight_is_let_go_of_unless_an_embedding_needs_it():
    pack_weights(parts := Parts(torch.float32), 8, release=True)
    assert parts.high.weight.numel() == parts.wide.weight.numel() == parts.head.weight.numel() == 0
    assert parts.tied.weight is parts.embedding.weight and parts.embedding.weight.shape == (83, 32)
    before = parts.outputs(2, torch.float32)
    pack_weights(parts, 8, release=True)  # once is enough
    assert all(torch.equal(a, b) for a, b in zip(before, parts.outputs(2, torch.float32), strict=True))
    pack_weights(kept := Parts(torch.float32), 8, release=False)
    assert kept.high.weight.shape == (64, 32)
