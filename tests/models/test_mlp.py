"""MLPs against formulas of the activations written out here, against transformers' Llama, and cut over two ranks."""

import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from models.mlp import MLPS
from tests.harness import run_ranks
from tests.models.helpers import on_rank, reference
from tests.models.helpers.build import ALONE, fill, joined_part, made, random_part, relative, shape, worst


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gated(activation):
    """act(first half) · second half: gate, then up."""
    return lambda x: activation(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :]


FORMULAS = {
    "gelu": gelu,
    "gelu_tanh": reference.gelu_tanh,
    "relu": lambda x: torch.where(x > 0, x, 0),
    "relu2": lambda x: torch.where(x > 0, x * x, 0),
    "swiglu": gated(lambda x: x / (1 + torch.exp(-x))),
    "geglu": gated(gelu),
    "geglu_tanh": gated(reference.gelu_tanh),
}


def test_every_registered_mlp_has_a_formula_here():
    assert FORMULAS.keys() == MLPS.keys()


@pytest.mark.parametrize("tensor", [1, 2])
def test_value_and_gradients_are_the_formula_s(tensor):
    """Every activation, with biases, to 1e-12 in fp64, on one rank and cut over two."""
    problems = {mlp: random_part("mlp", shape(mlp=mlp)) for mlp in MLPS}
    ranks = run_ranks(on_rank.run_parts, tensor, [("mlp", shape(mlp=mlp), *problem) for mlp, problem in problems.items()])
    for i, (mlp, (weights, x, dy)) in enumerate(problems.items()):
        true = reference.with_gradients(lambda x, w, mlp=mlp: reference.mlp(x, w, "mlp", FORMULAS[mlp]), x, weights, dy)
        assert worst(joined_part("mlp", shape(mlp=mlp), [rank[i] for rank in ranks]), true)[0] <= 1e-12, mlp


@pytest.mark.parametrize(("mlp", "activation"), [("swiglu", "silu"), ("geglu", "gelu")])
def test_gate_comes_before_up_as_in_llama(mlp, activation):
    torch.manual_seed(0)
    theirs = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48, hidden_act=activation, mlp_bias=True)).double()
    ours = made("mlp", shape(mlp=mlp), ALONE).double()
    named = dict(theirs.named_parameters())
    fused = {f"mlp.up.{kind}": torch.cat([named[f"gate_proj.{kind}"], named[f"up_proj.{kind}"]]) for kind in ("weight", "bias")}
    fill(ours, fused | {f"mlp.down.{kind}": named[f"down_proj.{kind}"] for kind in ("weight", "bias")})
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    assert relative(ours(x), theirs(x)) <= 1e-12


def test_without_biases_there_are_none():
    assert [name for name, _ in made("mlp", shape(bias=False), ALONE).named_parameters()] == ["up.weight", "down.weight"]
