"""Column → Row on real ranks against a dense pair of products in fp64: output, gradients of x, of every weight and bias."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.errors import Mistake
from parallel.grid import Grid, make_grid
from parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel.slices import gathered, slice_of
from tests.harness import run_ranks

B, S, IN, OUT = 2, 3, 10, 6
FUSED = {"one part": (8,), "gate and up": (8, 8), "q, k, v": (8, 4, 4)}
TOLERANCE = 1e-12


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    g = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shape, generator=g, dtype=torch.float64)


def inner(parts: list[Tensor]) -> Tensor:
    """What stands between the two products: something that mixes the parts but no features within one."""
    first, *rest = parts
    return torch.tanh(first) * sum([part.repeat_interleave(first.shape[-1] // part.shape[-1], -1) for part in rest], torch.ones(()))


def sandwich(parts: tuple[int, ...], bias: bool, grid: Grid) -> tuple[nn.Module, nn.Module]:
    column = ColumnParallelLinear("column", IN, parts, bias, drawn, grid)
    row = RowParallelLinear("row", parts[0], OUT, bias, drawn, grid)
    for module, name in ((column, "column.bias"), (row, "row.bias")):
        if module.bias is not None:  # biases begin at zero, which would hide one that is added twice
            cut = slice_of(module.bias)
            module.bias = nn.Parameter(cut.cut(drawn(name, cut.shape), grid.tensor_rank, grid.tensor))
            module.bias.slice = cut
    return column, row


def sliced(parts: tuple[int, ...], bias: bool) -> dict[str, Tensor]:
    grid = make_grid(1, dist.get_world_size())
    column, row = sandwich(parts, bias, grid)
    x = drawn("x", (B, S, IN)).requires_grad_()
    y = row(inner(list(column(x).split(column.parts, -1))))
    y.backward(drawn("gradient", y.shape))
    found = {"y": y.detach(), "x": x.grad}
    for layer, module in {"column": column, "row": row}.items():
        for name, parameter in module.named_parameters():
            cut = slice_of(parameter)
            found[f"{layer}.{name}"] = gathered(parameter.grad, cut, grid.tensor_group if cut.dim is not None else None)
    return found


def dense(parts: tuple[int, ...], bias: bool) -> dict[str, Tensor]:
    shapes = {"x": (B, S, IN), "column.weight": (sum(parts), IN), "row.weight": (OUT, parts[0])}
    shapes |= {"column.bias": (sum(parts),), "row.bias": (OUT,)} if bias else {}
    leaf = {name: drawn(name, shape).requires_grad_() for name, shape in shapes.items()}
    hidden = F.linear(leaf["x"], leaf["column.weight"], leaf.get("column.bias"))
    y = F.linear(inner(list(hidden.split(parts, -1))), leaf["row.weight"], leaf.get("row.bias"))
    y.backward(drawn("gradient", y.shape))
    return {"y": y.detach()} | {name: tensor.grad for name, tensor in leaf.items()}


def all_sandwiches() -> dict[tuple[str, bool], dict[str, Tensor]]:
    return {(name, bias): sliced(parts, bias) for name, parts in FUSED.items() for bias in (True, False)}


def assert_equal(name: str, found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text: f"{name}: {text}")


@functools.cache
def on_ranks(degree: int) -> list[dict]:
    return run_ranks(all_sandwiches, degree)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("parts", FUSED)
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_a_sandwich_is_the_dense_one(degree: int, parts: str, bias: bool) -> None:
    expected = dense(FUSED[parts], bias)
    for found in on_ranks(degree):
        assert set(found[parts, bias]) == set(expected)
        for name, tensor in expected.items():
            assert_equal(name, found[parts, bias][name], tensor)


@pytest.mark.parametrize("degree", [3, 5])
def test_an_uneven_size_is_refused_with_both_numbers(degree: int) -> None:
    grid = Grid(tensor=degree)
    with pytest.raises(Mistake, match=f"parallel.tensor = {degree} does not divide 8, the sliced size of up"):
        ColumnParallelLinear("up", IN, (8, 8), True, drawn, grid)
    with pytest.raises(Mistake, match=f"parallel.tensor = {degree} does not divide 8, the sliced size of down"):
        RowParallelLinear("down", 8, OUT, True, drawn, grid)


def test_every_part_is_checked_by_itself() -> None:
    with pytest.raises(Mistake, match="does not divide 3"):
        ColumnParallelLinear("qkv", IN, (6, 3, 3), True, drawn, Grid(tensor=2))  # 12 rows in all, which 2 does divide


def test_a_layer_shows_its_cut() -> None:
    assert "[16, 10] cut along dim 0 in parts [8, 4, 4]" in repr(ColumnParallelLinear("qkv", IN, (8, 4, 4), True, drawn, Grid(tensor=2)))
    assert "[6, 8] cut along dim 1" in repr(RowParallelLinear("down", 8, OUT, True, drawn, Grid(tensor=2)))


def test_only_what_is_cut_is_marked_as_cut() -> None:
    column, row = sandwich((8,), False, Grid(tensor=2, rank=1))
    replicated = RowParallelLinear("row", 8, OUT, True, drawn, Grid(tensor=2)).bias
    column_bias = ColumnParallelLinear("column", IN, (8,), True, drawn, Grid(tensor=2)).bias
    assert column.weight.tensor_model_parallel and row.weight.tensor_model_parallel and column_bias.tensor_model_parallel
    assert not hasattr(replicated, "tensor_model_parallel")
