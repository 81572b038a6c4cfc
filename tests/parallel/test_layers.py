"""The list of layers: how it is divided into stages, and the parameter names of the module built from it."""

import pytest
import torch
from torch import Tensor, nn

from models import gpt
from models.config import GPT
from parallel.engines.micro_batch import MicroBatch
from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import Layer, PlainModule, stage_bounds, unique_parameters
from parallel.slices import logical_name
from tests.parallel.helpers.training import LLAMA, MODEL


def listed(blocks: int, before: int, after: int) -> list[Layer]:
    kinds = ["before"] * before + ["blocks"] * blocks + ["after"] * after
    return [Layer(f"{kind}.{i}", nn.Identity, is_block=kind == "blocks") for i, kind in enumerate(kinds)]


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 2), (2, 1), (2, 0)])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 7, 12, 13])
def test_stages_cover_the_list_and_each_holds_a_block(blocks: int, before: int, after: int) -> None:
    layers = listed(blocks, before, after)
    for stages in range(1, blocks + 1):
        bounds = stage_bounds(layers, stages)
        assert len(bounds) == stages + 1 and bounds[0] == 0 and bounds[-1] == len(layers) and bounds == sorted(set(bounds))
        counts = [sum(layer.is_block for layer in layers[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
        assert sum(counts) == blocks and min(counts) >= 1 and max(counts) - min(counts) <= 1
        assert all(layers[first].is_block for first in bounds[1:-1]), "what precedes the blocks is stage 0's"


def test_more_stages_than_blocks_is_refused_with_both_numbers() -> None:
    with pytest.raises(Mistake, match="parallel.pipe = 5 is more than the 4 blocks of the model → use 4 or less"):
        stage_bounds(listed(4, 1, 1), 5)


@pytest.mark.parametrize("settings", [{}, {"tied": False}, LLAMA], ids=["gpt2", "untied", "llama"])
def test_parameters_are_named_by_their_logical_names(settings: dict) -> None:
    module = PlainModule(gpt.layers(GPT(**MODEL | settings), Grid(), seed=1))
    named = dict(module.named_parameters())
    assert named and {name: logical_name(parameter) for name, parameter in named.items()} == {name: name for name in named}
    assert dict(unique_parameters(module)) == named
    assert {"embedding.weight", "blocks.1.attention.qkv.weight", "blocks.0.mlp.down.weight", "final_norm.weight"} <= set(named)


def test_a_tied_table_is_one_parameter_named_once() -> None:
    tied = PlainModule(gpt.layers(GPT(**MODEL), Grid(), seed=1))
    names = [name for name, _ in unique_parameters(tied)]
    assert len(names) == len(set(names)) and "head.weight" not in names
    assert tied.head.weight is tied.embedding.weight
    untied = PlainModule(gpt.layers(GPT(**MODEL | {"tied": False}), Grid(), seed=1))
    assert [name for name, _ in unique_parameters(untied)] == [*names, "head.weight"]


def test_the_list_is_pure_and_in_order() -> None:
    layers = gpt.layers(GPT(**MODEL), Grid(pipe=2, tensor=2, rank=3), seed=1)
    assert [layer.name for layer in layers] == ["embedding", "position", *(f"blocks.{i}" for i in range(4)), "final_norm", "head"]
    assert [layer.is_block for layer in layers] == [layer.name.startswith("blocks.") for layer in layers]


class AddsBoth(nn.Module):
    """x + 10 · second + 100 · first, each a number per row."""

    def forward(self, x: Tensor, second: Tensor, first: Tensor) -> Tensor:
        return x + 10 * second[:, None] + 100 * first[:, None]


class AddsOne(nn.Module):
    """x + 1000 · second."""

    def forward(self, x: Tensor, second: Tensor) -> Tensor:
        return x + 1000 * second[:, None]


def test_layers_take_the_context_that_they_read_by_name() -> None:
    """The order of the names in a micro-batch, and that of a layer's parameters, do not matter."""
    names = ("first", "second")
    layers = [
        Layer("both", AddsBoth, context=names, reads=names),
        Layer("none", nn.Identity, context=names),
        Layer("one", AddsOne, context=names, reads=("second",), drops_context=True),
    ]
    module, x = PlainModule(layers), torch.zeros(2, 3, dtype=torch.int64)
    first, second = torch.tensor([1, 2]), torch.tensor([3, 4])
    batch = MicroBatch(x, (), {"second": second, "first": first, "read by nobody": second})
    expected = (1010 * second + 100 * first)[:, None].expand(2, 3)
    assert torch.equal(module(batch.inputs(module.context)), expected)
    with pytest.raises(KeyError, match="first"):
        MicroBatch(x, (), {"second": second}).inputs(module.context)
    with pytest.raises(ValueError, match="zip"):
        module((x, first))
