"""Norms against their formulas and against transformers, also where each rank normalises different data."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from models.norm import NORMS
from tests.harness import run_ranks
from tests.models.helpers import on_rank, reference
from tests.models.helpers.build import fill, gradients, relative, shape, values, worst

SIZE = 24


def made(norm: str, **changes):
    return NORMS[norm]("norm", SIZE, shape(norm=norm, **changes))


def problem(norm: str):
    """(module in fp64, x far from mean 0 and variance 1, dy, weights far from 1 and 0)."""
    g = torch.Generator().manual_seed(0)
    module = made(norm, norm_eps=1e-2).double()  # large enough that a misplaced eps shows
    weights = {name: torch.randn(SIZE, generator=g, dtype=torch.float64) for name in values(module)}
    fill(module, weights)
    x, dy = (torch.randn(6, 5, SIZE, generator=g, dtype=torch.float64) for _ in range(2))
    return module, 0.3 * x + 0.2, dy, weights


@pytest.mark.parametrize("norm", NORMS)
def test_value_and_gradients_are_the_formula_s(norm):
    """To 1e-12 in fp64."""
    module, x, dy, weights = problem(norm)
    true = reference.with_gradients(lambda x, w: reference.norm(x, w, "norm", shape(norm=norm, norm_eps=1e-2)), x, weights, dy)
    x.requires_grad_()
    y = module(x)
    y.backward(dy)
    assert worst({"y": y, "dx": x.grad, **gradients(module)}, true)[0] <= 1e-12


def test_rmsnorm_is_llama_s():
    """To 1e-6 in fp32, in which transformers computes it."""
    theirs, ours = LlamaRMSNorm(SIZE, eps=1e-5), made("rmsnorm")
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(SIZE, generator=g), 7 * torch.randn(3, SIZE, generator=g)
    with torch.no_grad():
        theirs.weight.copy_(weight)
    fill(ours, {"norm.weight": weight})
    assert relative(ours(x), theirs(x)) <= 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_bf16_loses_only_the_rounding_of_its_ends(norm):
    """Squares are not summed in bf16: the result is within 2⁻⁷ of fp64 on the same numbers, even if all are large."""
    module, x, _, weights = problem(norm)
    x = (100 * x).bfloat16()
    weights = {name: weight.bfloat16().double() for name, weight in weights.items()}
    true = reference.norm(x.double(), weights, "norm", shape(norm=norm, norm_eps=1e-2))
    fill(module, weights)
    assert relative(module.bfloat16()(x), true) <= 2**-7


def test_only_a_layernorm_with_biases_has_one():
    assert list(values(made("layernorm"))) == ["norm.weight", "norm.bias"]
    assert list(values(made("layernorm", bias=False))) == ["norm.weight"]
    assert list(values(made("rmsnorm"))) == ["norm.weight"]
    assert torch.equal(made("layernorm").weight, torch.ones(SIZE))
    assert torch.equal(made("layernorm").bias, torch.zeros(SIZE))


@pytest.mark.parametrize("norm", NORMS)
def test_partial_gradients_are_summed_over_the_ranks(norm):
    """With half of the data on each of two ranks, both have the whole gradient."""
    _, x, dy, weights = problem(norm)
    true = reference.with_gradients(lambda x, w: reference.norm(x, w, "norm", shape(norm=norm)), x, weights, dy)
    for rank in run_ranks(on_rank.own_halves_normalised, 2, norm, x, weights, dy):
        found = {name: torch.from_numpy(gradient) for name, gradient in rank.items()}
        assert worst(found, {name: true[name] for name in weights})[0] <= 1e-12
