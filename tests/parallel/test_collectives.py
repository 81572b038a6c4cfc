"""Each conjugate pair on real ranks, forward and gradient, against one dense computation in one process."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel import collectives
from parallel.collectives import conjugate, copy_to_tensor_ranks, identity, sum_of_own_piece
from parallel.grid import make_grid
from tests.harness import run_ranks

WHOLE = (2, 8, 12)  # b s d: four ranks divide s and d


class Pair(NamedTuple):
    """What one process would compute. `shared`: x is one tensor, equal on all ranks. `once`: so is y, and its gradient."""

    shared: bool
    once: bool
    dense: Callable[[list[Tensor]], list[Tensor]]
    """All ranks' x (one and the same where shared) -> all ranks' y."""
    cut: int | None = None
    """The dim along which a rank's x is a piece of the whole; None: x has the whole's shape."""


def copies(xs: list[Tensor]) -> list[Tensor]:
    return xs


def summed(xs: list[Tensor]) -> list[Tensor]:
    return [torch.stack(xs).sum(0)] * len(xs)


def joined(dim: int) -> Callable:
    return lambda xs: [torch.cat(xs, dim)] * len(xs)


def pieces(dim: int) -> Callable:
    return lambda xs: [x.tensor_split(len(xs), dim)[rank] for rank, x in enumerate(xs)]


PAIRS = {
    "copy_to_tensor_ranks": Pair(True, False, copies),
    "reduce_from_tensor_ranks": Pair(False, True, summed),
    "gather_from_tensor_ranks": Pair(False, True, joined(-1), cut=2),
    "scatter_to_tensor_ranks": Pair(True, False, pieces(-1)),
    "gather_sequence": Pair(False, False, joined(1), cut=1),
    "reduce_scatter_sequence": Pair(False, False, lambda xs: pieces(1)(summed(xs))),
    "scatter_sequence": Pair(True, False, pieces(1)),
    "join_sequence": Pair(False, True, joined(1), cut=1),
}


def drawn(key: int, shape: tuple[int, ...], strided: bool) -> Tensor:
    """fp64 numbers of that shape; strided: laid out in memory the other way round."""
    g = torch.Generator().manual_seed(key)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return x.transpose(0, 2).contiguous().transpose(0, 2) if strided else x


def input_of(pair: Pair, rank: int, world: int, strided: bool) -> Tensor:
    shape = [n // world if dim == pair.cut else n for dim, n in enumerate(WHOLE)]
    return drawn(0 if pair.shared else rank, tuple(shape), strided)


def coefficients(pair: Pair, rank: int, shape: tuple[int, ...], strided: bool) -> Tensor:
    """What the loss of a rank weighs y with: its own on every rank, unless y is one tensor that is consumed once."""
    return drawn(100 if pair.once else 100 + rank, shape, strided)


def on_ranks(strided: bool) -> dict[str, tuple[Tensor, Tensor, bool]]:
    """name -> y, x's gradient, and whether x was left as it was; the gradient of y is `coefficients`, laid out like x."""
    grid = make_grid(1, dist.get_world_size())
    found = {}
    for name, pair in PAIRS.items():
        x = input_of(pair, grid.tensor_rank, grid.tensor, strided).requires_grad_()
        before = x.detach().clone()
        y = getattr(collectives, name)(x, grid.tensor_group)
        y.backward(coefficients(pair, grid.tensor_rank, y.shape, strided))
        found[name] = y.detach(), x.grad, torch.equal(x, before)
    return found


def in_one_process(pair: Pair, world: int) -> tuple[list[Tensor], list[Tensor]]:
    xs = [input_of(pair, rank, world, False).requires_grad_() for rank in range(world)]
    if pair.shared:
        xs = [xs[0]] * world
    ys = pair.dense(xs)
    loss = sum((coefficients(pair, rank, y.shape, False) * y).sum() for rank, y in enumerate(ys[:1] if pair.once else ys))
    loss.backward()
    return ys, [x.grad for x in xs]


@pytest.fixture(scope="module")
def ranks() -> dict[tuple[int, bool], list[dict]]:
    return {(world, strided): run_ranks(on_ranks, world, strided) for world in (2, 4) for strided in (False, True)}


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_its_dense_computation(name: str, world: int, strided: bool, ranks) -> None:
    ys, gradients = in_one_process(PAIRS[name], world)
    for rank, found in enumerate(ranks[world, strided]):
        y, gradient, untouched = found[name]
        assert y.shape == ys[rank].shape and gradient.shape == gradients[rank].shape
        torch.testing.assert_close(y, ys[rank], rtol=0, atol=1e-14)
        torch.testing.assert_close(gradient, gradients[rank], rtol=0, atol=1e-14)
        assert untouched, "a collective wrote its input"


def all_reduce_in_place(x: Tensor, group) -> Tensor:
    dist.all_reduce(x, group=group)
    return x


def gradients_beside_a_copy() -> dict[str, list[float]]:
    """x enters a sliced region and y a replicated one; autograd hands both the *same* gradient tensor."""
    group = make_grid(1, dist.get_world_size()).tensor_group
    found = {}
    for name, copy in {"ours": copy_to_tensor_ranks, "in place": conjugate(identity, all_reduce_in_place)}.items():
        x, y = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
        earlier = y * 1  # its backward runs after the copy's
        (copy(x, group) + earlier).backward(torch.ones(3))
        found[name] = [float(x.grad[0]), float(y.grad[0])]
    return found


def test_a_gradient_that_autograd_shares_is_not_written() -> None:
    for found in run_ranks(gradients_beside_a_copy, 2):
        assert found["ours"] == [2.0, 1.0]
        assert found["in place"] == [2.0, 2.0], "the trap that this test is to see is no longer one"


@pytest.mark.parametrize("name", PAIRS)
def test_without_a_group_nothing_happens(name: str) -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert getattr(collectives, name)(x, None) is x


def both_reduce_scatters() -> tuple[bool, float]:
    """Whether the sums are equal for whole numbers, which no order changes, and how far they differ for others."""
    group = make_grid(1, dist.get_world_size()).tensor_group
    numbers = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(dist.get_rank()))
    whole = [sum_of_own_piece((numbers * 100).round().chunk(3, 1), group, as_one) for as_one in (False, True)]
    real = [sum_of_own_piece(numbers.chunk(3, 1), group, as_one) for as_one in (False, True)]
    return torch.equal(*whole), float((real[0] - real[1]).abs().max())


def test_a_reduce_scatter_of_one_tensor_as_on_gpus_is_that_of_a_list() -> None:
    for equal, difference in run_ranks(both_reduce_scatters, 3):
        assert equal and difference < 1e-6


def uneven() -> list[str]:
    group, told = make_grid(1, dist.get_world_size()).tensor_group, []
    for name, shape in {"scatter_to_tensor_ranks": (2, 4, 5), "scatter_sequence": (2, 5, 4), "reduce_scatter_sequence": (2, 5, 4)}.items():
        with pytest.raises(ValueError) as refused:
            getattr(collectives, name)(torch.zeros(shape), group)
        told.append(str(refused.value))
    return told


def test_an_uneven_split_is_an_error_and_not_a_hang() -> None:
    for told in run_ranks(uneven, 2):
        assert [text.split(",")[0] for text in told] == ["2 ranks do not divide 5"] * 3
