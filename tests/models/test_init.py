"""Weight initialisation: standard deviations, and that weights depend on the seed and the logical name alone."""

import math

import pytest
import torch

from models import init
from models.init import INITS
from parallel.grid import Grid
from parallel.layers import unique_parameters
from parallel.slices import slice_of
from tests.harness import run_ranks
from tests.models.helpers import on_rank
from tests.models.helpers.build import shape, values, whole_model

STANDARD_DEVIATIONS = {
    "gpt2": {"embedding": 0.02, "position": 0.02, "head": 0.02, "qkv": 0.02, "up": 0.02, "output": 0.01, "down": 0.01},
    "small_wang": dict.fromkeys(("embedding", "position", "head", "qkv", "up"), 0.1) | dict.fromkeys(("output", "down"), 40**-0.5),
}
"""Computed by hand for two layers of hidden size 40: 0.02/√(2·2) = 0.01; √(2/(5·40)) = 0.1, 2/(2·√40) = 1/√40."""


@pytest.mark.parametrize("scheme", INITS)
def test_spread_of_every_weight(scheme):
    """Mean and standard deviation are within five standard errors. Biases are zero and norm weights are one."""
    model = whole_model(shape(init=scheme, hidden_size=40, ffn_size=160, vocab_size=997, seq_length=64, tied=False))
    for name, tensor in values(model).items():
        module, kind = name.split(".")[-2:]
        if kind == "bias":
            assert not tensor.any(), name
        elif "norm" in module:
            assert (tensor == 1).all(), name
        else:
            true, n = STANDARD_DEVIATIONS[scheme][module], tensor.numel()
            assert abs(tensor.std() / true - 1) < 5 / math.sqrt(2 * n), name
            assert abs(tensor.mean()) < 5 * true / math.sqrt(n), name


def test_all_registered_schemes_are_measured():
    assert STANDARD_DEVIATIONS.keys() == INITS.keys()


@pytest.mark.parametrize("layers", [1, 3, 8])
def test_residual_outputs_shrink_with_depth_and_nothing_else_does(layers):
    """Adding a layer leaves every other parameter unchanged to the bit, except for the factor of projections onto the residual stream."""
    few, many = values(whole_model(shape(num_layers=layers))), values(whole_model(shape(num_layers=2 * layers)))
    assert few.keys() < many.keys()
    for name, tensor in few.items():
        if name.endswith(("output.weight", "down.weight")):
            assert torch.allclose(tensor, math.sqrt(2) * many[name], rtol=1e-5, atol=0)
        else:
            assert torch.equal(tensor, many[name]), name


@pytest.mark.parametrize("scheme", INITS)
@pytest.mark.parametrize("tensor", [2, 4])
def test_tensor_ranks_hold_pieces_of_the_same_tensors(scheme, tensor):
    """Joined, they are equal to the model on one rank bit for bit. Padded vocabulary rows are zero: 83 = 2·42 − 1 = 4·21 − 1."""
    model = shape(init=scheme, mlp="swiglu", num_heads=8, num_kv_heads=4, qk_norm=True, tied=False)
    ranks = [values(whole_model(model, Grid(tensor=tensor, rank=rank))) for rank in range(tensor)]
    for name, parameter in unique_parameters(whole_model(model)):
        assert torch.equal(slice_of(parameter).join([rank[name] for rank in ranks]), parameter), name
    for table in ("embedding.weight", "head.weight"):
        assert not ranks[-1][table][-1].any()
        assert ranks[-1][table][:-1].all()


def test_a_draw_is_a_function_of_seed_and_name():
    """The same seed gives the same bits, whatever was drawn before. Another seed or name is uncorrelated (five standard errors)."""
    first, again, other = (values(whole_model(shape(tied=False), seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name, tensor in first.items() if tensor.dim() == 2]
    for name in drawn:
        assert abs(correlation(first[name], other[name])) < 5, name
    for a, b in zip(drawn, drawn[1:], strict=False):
        assert abs(correlation(first[a], first[b])) < 5, (a, b)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """The correlation of the leading entries, in standard errors."""
    n = min(a.numel(), b.numel())
    return float(torch.corrcoef(torch.stack([a.flatten()[:n], b.flatten()[:n]]))[0, 1] * math.sqrt(n))


def test_nobody_else_s_randomness_is_used_or_moved():
    before = torch.get_rng_state()
    first = init.normal(0, "a", (5,), 1.0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    assert torch.equal(init.normal(0, "a", (5,), 1.0), first)


def test_a_larger_seed_or_a_name_that_continues_a_number_is_another_stream():
    """Seed 1 of "2a" is not seed 12 of "a"."""
    draws = [init.normal(seed, name, (4,), 1.0) for seed, name in ((1, "2a"), (12, "a"), (1, "a"), (2**40, "a"), (0, "a"), (-1, "a"))]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


@pytest.mark.parametrize("tensor", [1, 2])
def test_under_zero_3_in_bf16_the_same_numbers_are_drawn_and_then_rounded(tensor):
    """Two ranks, along data or tensor.

    zero.Init makes torch's constructors bf16, and a draw in bf16 has other last numbers where 16 does not divide their count:
    so here, 83 · 20 and the rest.
    """
    model = shape(hidden_size=20, ffn_size=30, mlp="swiglu", norm="rmsnorm", num_kv_heads=2, bias=False, tied=False)
    true = {name: parameter.bfloat16().float() for name, parameter in values(whole_model(model, seed=11)).items()}
    for rank in run_ranks(on_rank.drawn_under_zero_3, 2, model, tensor, 11):
        found = {name: torch.from_numpy(array) for name, array in rank.items()}
        assert found.keys() == true.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in true.items())
