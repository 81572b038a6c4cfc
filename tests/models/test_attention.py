"""Attention against an explicit softmax(q kᵀ/√e) v, head by head, in fp64: outputs and gradients, on one rank and on two."""

import pytest
import torch

from models import attention
from models.config import GPT
from models.position import POSITIONS
from parallel.errors import Mistake
from parallel.grid import Grid
from tests.harness import run_ranks
from tests.models.helpers import on_rank, reference
from tests.models.helpers.build import ALONE, fill, joined_part, made, random_part, relative, scatter, shape, values, whole_model, worst

MODELS = {
    "multi-head": shape(),
    "grouped": shape(num_heads=8, num_kv_heads=2),
    "no biases": shape(bias=False, qkv_bias=False),
    "biases of qkv only": shape(bias=False, num_kv_heads=2),
    "qk layernorm": shape(qk_norm=True, head_size=12, output_bias=False),
    "qk rmsnorm, grouped": shape(qk_norm=True, norm="rmsnorm", num_heads=8, num_kv_heads=4),
}


@pytest.mark.parametrize("tensor", [1, 2])
def test_value_and_gradients_are_the_explicit_softmax_s(tensor):
    """To 1e-12, for every parameter by its logical name, including the head norms, of whose gradient each rank computes a part."""
    problems = {case: random_part("attention", model) for case, model in MODELS.items()}
    ranks = run_ranks(on_rank.run_parts, tensor, [("attention", MODELS[case], *problem) for case, problem in problems.items()])
    for i, (case, (weights, x, dy)) in enumerate(problems.items()):
        true = reference.with_gradients(lambda x, w, case=case: reference.attention(x, w, "attention", MODELS[case]), x, weights, dy)
        error, name = worst(joined_part("attention", MODELS[case], [rank[i] for rank in ranks]), true)
        assert error <= 1e-12, (case, name)


def ungrouped(weights: dict, model: GPT) -> dict:
    """Weights of a multi-head attention in which each shared kv head is repeated for every head that uses it."""
    sizes = [model.hidden_size] + [model.num_kv_heads * model.head_size] * 2
    found = dict(weights)
    for kind in ("weight", "bias"):
        q, k, v = weights[f"attention.qkv.{kind}"].split(sizes)
        k, v = (part.unflatten(0, (model.num_kv_heads, -1)).repeat_interleave(4, dim=0).flatten(0, 1) for part in (k, v))
        found[f"attention.qkv.{kind}"] = torch.cat([q, k, v])
    return found


def test_grouped_heads_are_repeated_ones():
    few, many = shape(num_heads=8, num_kv_heads=2), shape(num_heads=8, num_kv_heads=8)
    weights, x, _ = random_part("attention", few)
    grouped, full = made("attention", few, ALONE).double(), made("attention", many, ALONE).double()
    fill(grouped, weights)
    fill(full, ungrouped(weights, few))
    assert relative(grouped(x), full(x)) <= 1e-12


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_no_logit_depends_on_a_later_token(position, qk_norm):
    """All tokens from the tenth on are replaced. The logits before it stay the same (1e-12, fp64), those after it change."""
    model = whole_model(shape(position=position, qk_norm=qk_norm, num_kv_heads=2)).double()
    scatter(model)
    ids = torch.randint(0, 83, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 83
    assert relative(model(changed)[:, :10], model(ids)[:, :10]) <= 1e-12
    assert relative(model(changed)[:, 10:], model(ids)[:, 10:]) > 1e-3


def test_head_norms_are_of_one_head_s_size():
    sizes = {name: len(tensor) for name, tensor in values(made("attention", shape(qk_norm=True), ALONE)).items() if "_norm." in name}
    assert sizes == {f"attention.{part}_norm.{kind}": 8 for part in "qk" for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        (dict(num_heads=2, num_kv_heads=2), r"parallel.tensor = 4 does not divide 2, .* attention"),
        (dict(num_heads=12, num_kv_heads=3, hidden_size=96), "parallel.tensor = 4 does not fit model.num_kv_heads = 3"),
        (dict(num_heads=8, num_kv_heads=1, hidden_size=8), "parallel.tensor = 4 does not fit model.num_kv_heads = 1"),
    ],
)
def test_heads_that_cannot_be_dealt_are_refused(heads, words):
    """Query heads are never cut. A kv head is shared, by features, by a whole number of ranks. Other numbers are refused."""
    with pytest.raises(Mistake, match=words):
        made("attention", shape(**heads), Grid(tensor=4, rank=1))


def test_repeated_kv_heads_are_the_shared_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU in fp32 no fused kernel takes shared kv heads, so they are repeated; with a bias too."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 16, 8, generator=g) for heads in (6, 2, 2))
    core = attention.Core("core", 0.0, 0, ALONE)
    biases = [None, torch.randn(6, 16, 16, generator=g)]
    shared = [core(q, k, v, bias, None) for bias in biases]
    monkeypatch.setattr(attention, "needs_repeated_heads", lambda dtype, device: True)
    for bias, expected in zip(biases, shared, strict=True):
        torch.testing.assert_close(core(q, k, v, bias, None), expected, rtol=1e-6, atol=1e-6)
    monkeypatch.undo()
    cases = [("cuda", torch.float32), ("cuda", torch.bfloat16), ("cpu", torch.float32)]
    assert [attention.needs_repeated_heads(dtype, torch.device(kind)) for kind, dtype in cases] == [True, False, False]
