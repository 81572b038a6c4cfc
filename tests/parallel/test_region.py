"""Sequence parallelism on real ranks against dense products in fp64, and what it communicates, counted."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from models.block import RESIDUALS
from models.config import GPT
from models.recompute import recomputed
from models.registry import BuildContext
from parallel.grid import Grid, make_grid
from parallel.region import SequenceParallelRegion, TensorParallelRegion, region_of
from parallel.slices import gathered, slice_of
from parallel.vocab import TiedHead, VocabParallelEmbedding, VocabParallelHead
from tests.harness import run_ranks
from tests.parallel.test_linear import FUSED, IN, OUT, assert_equal, drawn, inner, sandwich

B, S, VOCAB, HIDDEN = 2, 8, 11, 6


def own(x: Tensor, grid: Grid) -> Tensor:
    """This rank's positions."""
    return x.chunk(grid.tensor, 1)[grid.tensor_rank]


def joined(x: Tensor, grid: Grid) -> Tensor:
    """All ranks' positions, by a plain gather."""
    pieces = [torch.empty_like(x) for _ in range(grid.tensor)]
    dist.all_gather(pieces, x.contiguous(), group=grid.tensor_group)
    return torch.cat(pieces, 1)


def whole_gradients(grid: Grid, **modules: torch.nn.Module) -> dict[str, Tensor]:
    """By name: slices joined, what every rank holds whole as it is on this one."""
    found = {}
    for layer, module in modules.items():
        for name, parameter in module.named_parameters():
            cut = slice_of(parameter)
            found[f"{layer}.{name}"] = gathered(parameter.grad, cut, grid.tensor_group if cut.dim is not None else None)
    return found


# Column, then row.


def cut_sandwich(parts: tuple[int, ...], bias: bool) -> dict[str, Tensor]:
    grid = make_grid(1, dist.get_world_size(), sequence=True)
    column, row = sandwich(parts, bias, grid)
    x = own(drawn("x", (B, S, IN)), grid).clone().requires_grad_()
    hidden = column(x)
    assert hidden.shape == (B, S, sum(parts) // grid.tensor)  # inside: own features of all positions
    y = row(inner(list(hidden.split(column.parts, -1))))
    assert y.shape == (B, S // grid.tensor, OUT)  # outside: all features of own positions
    y.backward(own(drawn("gradient", (B, S, OUT)), grid))
    return {"y": joined(y.detach(), grid), "x": joined(x.grad, grid), **whole_gradients(grid, column=column, row=row)}


def dense_sandwich(parts: tuple[int, ...], bias: bool) -> dict[str, Tensor]:
    shapes = {"x": (B, S, IN), "column.weight": (sum(parts), IN), "row.weight": (OUT, parts[0])}
    shapes |= {"column.bias": (sum(parts),), "row.bias": (OUT,)} if bias else {}
    leaf = {name: drawn(name, shape).requires_grad_() for name, shape in shapes.items()}
    hidden = F.linear(leaf["x"], leaf["column.weight"], leaf.get("column.bias"))
    y = F.linear(inner(list(hidden.split(parts, -1))), leaf["row.weight"], leaf.get("row.bias"))
    y.backward(drawn("gradient", y.shape))
    return {"y": y.detach()} | {name: tensor.grad for name, tensor in leaf.items()}


def all_sandwiches() -> dict[tuple[str, bool], dict[str, Tensor]]:
    return {(name, bias): cut_sandwich(parts, bias) for name, parts in FUSED.items() for bias in (True, False)}


@functools.cache
def on_ranks(function: Callable[[], Any], degree: int) -> list[Any]:
    return run_ranks(function, degree)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("parts", FUSED)
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_a_sandwich_is_the_dense_one(degree: int, parts: str, bias: bool) -> None:
    """Positions joined, 1e-12: also the row's bias, of whose gradient each rank saw its own positions."""
    expected = dense_sandwich(FUSED[parts], bias)
    for found in on_ranks(all_sandwiches, degree):
        assert set(found[parts, bias]) == set(expected)
        for name, tensor in expected.items():
            assert_equal(name, found[parts, bias][name], tensor)


# Embedding, then head.


def cut_vocabulary(tied: bool) -> dict[str, Tensor]:
    grid = make_grid(1, dist.get_world_size(), sequence=True)
    embedding = VocabParallelEmbedding("embedding", VOCAB, HIDDEN, drawn, grid)
    head = TiedHead(embedding) if tied else VocabParallelHead("head", VOCAB, HIDDEN, drawn, grid)
    x = embedding(token_ids())
    assert x.shape == (B, S // grid.tensor, HIDDEN)
    logits = head(torch.tanh(x))
    rows = logits.shape[-1]
    first = rows * grid.tensor_rank
    gradient = F.pad(drawn("gradient", (B, S, VOCAB)), (0, rows * grid.tensor - VOCAB))[..., first : first + rows]
    logits.backward(gradient)
    pieces = [torch.empty_like(logits) for _ in range(grid.tensor)]
    dist.all_gather(pieces, logits.detach().contiguous(), group=grid.tensor_group)
    modules = {"embedding": embedding} | ({} if tied else {"head": head})
    return {"x": joined(x.detach(), grid), "logits": torch.cat(pieces, -1)[..., :VOCAB], **whole_gradients(grid, **modules)}


def token_ids() -> Tensor:
    return torch.arange(B * S).reshape(B, S) * 7 % VOCAB


def dense_vocabulary(tied: bool) -> dict[str, Tensor]:
    names = ["embedding"] if tied else ["embedding", "head"]
    tables = {name: drawn(f"{name}.weight", (VOCAB, HIDDEN)).requires_grad_() for name in names}
    x = tables["embedding"][token_ids()]
    logits = torch.tanh(x) @ tables["embedding" if tied else "head"].T
    logits.backward(drawn("gradient", logits.shape))
    return {"x": x.detach(), "logits": logits.detach()} | {f"{name}.weight": table.grad for name, table in tables.items()}


def both_vocabularies() -> dict[bool, dict[str, Tensor]]:
    return {tied: cut_vocabulary(tied) for tied in (True, False)}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_embedding_and_head_are_the_dense_ones(degree: int, tied: bool) -> None:
    expected = dense_vocabulary(tied)
    for found in on_ranks(both_vocabularies, degree):
        assert set(found[tied]) == set(expected)
        for name, tensor in expected.items():
            assert_equal(name, found[tied][name], tensor)


# What is communicated.


COUNTED = GPT(
    num_layers=1, hidden_size=16, num_heads=4, num_kv_heads=4, ffn_size=48, vocab_size=11, seq_length=S, norm="layernorm", norm_eps=1e-5,
    position="rotary", rotary_fraction=1.0, rotary_base=1e4, rotary_scaling="none", mlp="gelu", residual="pre_norm", init="gpt2", bias=True,
    qkv_bias=True, qk_norm=False, tied=True, embedding_dropout=0.0, residual_dropout=0.1, mlp_dropout=0.1, attention_dropout=0.1,
)  # fmt: skip
WHOLE = B * S * COUNTED.hidden_size
"""b·s·h, in elements."""


class Counting:
    """Counts the collectives of torch.distributed that are called inside: (operation, elements of the whole tensor) -> calls."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, int]] = Counter()

    def __enter__(self) -> "Counting":
        self.real = {name: getattr(dist, name) for name in dir(dist) if name.startswith(NAMES) and callable(getattr(dist, name))}
        for name, call in self.real.items():
            setattr(dist, name, functools.partial(self.counted, name, call))
        return self

    def counted(self, name: str, call: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        """all_reduce(x), all_gather_single(whole, x), reduce_scatter(mine, pieces); anything else counts by name alone."""
        tensors = next((a for a in arguments if isinstance(a, list)), arguments[:1])
        self.calls[name.removesuffix("_single"), sum(tensor.numel() for tensor in tensors)] += 1
        return call(*arguments, **settings)

    def __exit__(self, *raised: Any) -> None:
        for name, call in self.real.items():
            setattr(dist, name, call)


NAMES = ("all_", "reduce", "broadcast", "gather", "scatter", "send", "recv", "isend", "irecv", "batch_isend")


NO_DROPOUT = dict(residual_dropout=0.0, mlp_dropout=0.0, attention_dropout=0.0)


def communicated(sequence: bool, recompute: str, drops: bool = True) -> tuple[Counter, Counter]:
    """(forward, backward) of one block in training."""
    grid = make_grid(1, dist.get_world_size(), sequence)
    kind = recomputed(RESIDUALS["pre_norm"]) if recompute == "full" else RESIDUALS["pre_norm"]
    block = kind("block", BuildContext(COUNTED.model_copy(update={} if drops else NO_DROPOUT), grid, 0, {}, recompute))
    x = torch.randn(B, S // grid.tensor if sequence else S, COUNTED.hidden_size, requires_grad=True)
    with Counting() as forward:
        y = block(x, torch.arange(B))
    with Counting() as backward:
        y.sum().backward()
    return forward.calls, backward.calls


def all_communicated() -> dict[tuple, tuple[Counter, Counter]]:
    kinds = [(sequence, recompute) for sequence in (False, True) for recompute in ("none", "full")]
    return {kind: communicated(*kind) for kind in [*kinds, (False, "full", False), (True, "full", False)]}


def sent(calls: Counter, degree: int, least: int = 0) -> float:
    """Elements that each rank sends on a ring; an all-reduce is a reduce-scatter and an all-gather."""
    return sum(
        (2 if name == "all_reduce" else 1) * count * elements * (degree - 1) / degree
        for (name, elements), count in calls.items()
        if elements >= least
    )


@pytest.mark.parametrize("degree", [2, 4])
def test_a_block_makes_four_all_reduces(degree: int) -> None:
    """Two forward, two backward, of b·s·h; nothing else."""
    for found in on_ranks(all_communicated, degree):
        forward, backward = found[False, "none"]
        assert forward == backward == {("all_reduce", WHOLE): 2}
        assert sent(forward + backward, degree) == 8 * WHOLE * (degree - 1) / degree


@pytest.mark.parametrize("degree", [2, 4])
def test_a_block_cut_along_the_sequence_gathers_and_reduce_scatters_as_much(degree: int) -> None:
    """Two of each both ways; and one all-reduce of h for each parameter used out here: two norms' weight and bias, two row biases."""
    for found in on_ranks(all_communicated, degree):
        forward, backward = found[True, "none"]
        both = {("all_gather", WHOLE): 2, ("reduce_scatter", WHOLE): 2}
        assert forward == both
        assert backward == both | {("all_reduce", COUNTED.hidden_size): 6}
        assert sent(forward + backward, degree, least=WHOLE) == 8 * WHOLE * (degree - 1) / degree


@pytest.mark.parametrize("degree", [2, 4])
def test_recomputing_a_block_communicates_its_forward_pass_again(degree: int) -> None:
    """All of it where dropout's mask, behind the last reduction, is asked for; else torch stops before that one."""
    for found in on_ranks(all_communicated, degree):
        for drops, kind in ((1, ("full",)), (0, ("full", False))):
            assert found[False, *kind] == ({("all_reduce", WHOLE): 2}, {("all_reduce", WHOLE): 3 + drops})
            forward, backward = found[True, *kind]
            assert forward == {("all_gather", WHOLE): 2, ("reduce_scatter", WHOLE): 2}
            again = {("all_gather", WHOLE): 4, ("reduce_scatter", WHOLE): 3 + drops}
            assert backward == again | {("all_reduce", COUNTED.hidden_size): 6}


def kept_gathered(sequence: bool) -> int:
    """Elements of 'b s h' activations, whole or cut, that a block without dropout keeps for its backward pass."""
    grid = make_grid(1, dist.get_world_size(), sequence)
    block = RESIDUALS["pre_norm"]("block", BuildContext(COUNTED.model_copy(update=NO_DROPOUT), grid, 0, {}))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.shape[-1:] == (COUNTED.hidden_size,):
            kept[storage.data_ptr()] = storage.nbytes() // tensor.itemsize
        return tensor

    x = torch.randn(B, S // grid.tensor if sequence else S, COUNTED.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)
    assert y.requires_grad  # and with it all that is kept
    return sum(kept.values())


@pytest.mark.parametrize("degree", [2, 4])
def test_what_is_gathered_is_kept_and_the_rest_is_cut(degree: int) -> None:
    """Both norms' inputs are kept cut, both linear layers' inputs whole: (2 + 2/t)·b·s·h, of 4·b·s·h without."""
    assert set(run_ranks(kept_gathered, degree, False)) == {4 * WHOLE}
    assert set(run_ranks(kept_gathered, degree, True)) == {2 * WHOLE + 2 * WHOLE // degree}


# On one rank, and on a grid that only describes.


@pytest.mark.parametrize("region", [TensorParallelRegion(None), SequenceParallelRegion(None)], ids=["whole", "sequence"])
def test_over_one_rank_nothing_happens(region: TensorParallelRegion) -> None:
    x = torch.randn(2, 6, 4)
    assert region.enter(x) is x and region.leave(x) is x and region.first_position(x) == 0 and region.partial_group is None


def test_a_grid_chooses_its_region() -> None:
    assert type(region_of(Grid())) is TensorParallelRegion and type(region_of(Grid(tensor=2, sequence=True))) is SequenceParallelRegion


def places() -> tuple[int, bool, bool]:
    grid = make_grid(1, dist.get_world_size(), sequence=True)
    x = torch.zeros(2, 3, 4)
    return (
        region_of(grid).first_position(x),
        region_of(grid).partial_group is grid.tensor_group,
        TensorParallelRegion(grid.tensor_group).partial_group is None,
    )


def test_each_rank_knows_the_place_of_its_positions() -> None:
    assert run_ranks(places, 4) == [(3 * rank, True, True) for rank in range(4)]


def uneven() -> None:
    grid = make_grid(1, 2, sequence=True)
    region_of(grid).leave(torch.zeros(2, 7, 4))


def test_positions_that_ranks_do_not_divide_are_refused_before_they_wait() -> None:
    with pytest.raises(AssertionError, match="2 ranks do not divide 7, dim 1"):
        run_ranks(uneven, 2)
