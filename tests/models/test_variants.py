"""A user's variant.py keeps working: a model made of its classes, against a dense reference, on sliced ranks, recomputed and decoded."""

import math

import pytest
import torch
from torch import Tensor

from models import gpt
from models.config import GPT
from models.inference.decoder import Decoder
from parallel.layers import PlainModule
from tests.harness import run_ranks
from tests.models.helpers import decoding, on_rank
from tests.models.helpers.build import (
    ALONE,
    SEED,
    gradients,
    joined,
    random_weights,
    relative,
    scatter,
    shape,
    tensor_grid,
    values,
    whole_model,
    worst,
)
from tests.models.helpers.decoding import LENGTH, filled, logits_of
from tests.models.helpers.reference import Weights, linear
from tests.models.helpers.variants import NAMED, VARIANTS, GainAttention, SandwichBlock

MODEL = shape(**NAMED, qk_norm=True, num_kv_heads=2, tied=False, seq_length=LENGTH)
"""With qk_norm, so that the variant's norm is used for head norms too."""
DROPOUT = dict(embedding_dropout=0.1, residual_dropout=0.1, mlp_dropout=0.1, attention_dropout=0.1)


def norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    return weights[f"{name}.weight"] * x / (1 + (weights[f"{name}.alpha"] * x).abs())


def attention(x: Tensor, weights: Weights, name: str, model: GPT) -> Tensor:
    """Head by head: softmax over the past of log(2 + t) q_t·k_u/√e, then v times the head's gain."""
    e, length = model.head_size, x.shape[1]
    q_size, kv_size = model.num_heads * e, model.num_kv_heads * e
    q, k, v = linear(x, weights, f"{name}.qkv").split([q_size, kv_size, kv_size], dim=-1)
    factors = torch.tensor([math.log(2 + t) for t in range(length)], dtype=torch.float64)[:, None]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    heads = []
    for h in range(model.num_heads):
        kv = h * model.num_kv_heads // model.num_heads
        q_h = norm(q[..., h * e : (h + 1) * e], weights, f"{name}.q_norm") * factors
        k_h, v_h = norm(k[..., kv * e : (kv + 1) * e], weights, f"{name}.k_norm"), v[..., kv * e : (kv + 1) * e]
        probabilities = (q_h @ k_h.transpose(-1, -2) / math.sqrt(e)).masked_fill(future, -math.inf).softmax(-1)
        heads.append(probabilities @ v_h * weights[f"{name}.gain"][h])
    return linear(torch.cat(heads, dim=-1), weights, f"{name}.output")


def dense(ids: Tensor, weights: Weights, model: GPT) -> Tensor:
    """Logits 'b s v' of the whole model from its equations."""
    x = weights["embedding.weight"][ids]
    for block in (f"blocks.{i}" for i in range(model.num_layers)):
        y = attention(norm(x, weights, f"{block}.attention_norm"), weights, f"{block}.attention", model)
        x = x + norm(y, weights, f"{block}.output_norm")
        gate, up = linear(norm(x, weights, f"{block}.mlp_norm"), weights, f"{block}.mlp.up").chunk(2, dim=-1)
        x = x + linear(up / (1 + (-gate).exp()), weights, f"{block}.mlp.down")
    return norm(x, weights, "final_norm") @ weights["head.weight"].T


def sliced(model: GPT, sequence: bool) -> tuple:
    """(this rank's logits, its gradients by logical name), fp64, on every tensor rank."""
    return on_rank.run_model(model, random_weights(model, 0, VARIANTS), tensor_grid(sequence), VARIANTS)


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True), (4, True)])
def test_a_model_of_own_classes_is_the_dense_one(tensor, sequence):
    """Logits to 1e-12 and the gradient of every parameter to 1e-10 in fp64. On four ranks, two share a kv head."""
    ids, targets, token_weights = on_rank.tokens()
    weights = {name: tensor.requires_grad_() for name, tensor in random_weights(MODEL, 0, VARIANTS).items()}
    logits = dense(ids, weights, MODEL)
    losses = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    (token_weights * losses).sum().backward()
    ranks = run_ranks(sliced, tensor, MODEL, sequence)
    found = torch.cat([torch.from_numpy(rank_logits) for rank_logits, _ in ranks], dim=-1)[..., : MODEL.vocab_size]
    assert relative(found, logits) <= 1e-12
    error, name = worst(joined(MODEL, [arrays for _, arrays in ranks], VARIANTS), {name: w.grad for name, w in weights.items()})
    assert error <= 1e-10, name


def test_every_class_is_built_where_its_setting_puts_it():
    module = whole_model(MODEL, variants=VARIANTS)
    blocks = [part for part in module.modules() if isinstance(part, SandwichBlock)]
    assert len(blocks) == MODEL.num_layers and all(type(block.attention) is GainAttention for block in blocks)
    kinds = {type(part).__name__ for part in module.modules()}
    assert kinds >= {"SoftSign", "SigmoidGLU", "LogLength", "SandwichBlock", "GainAttention"}
    drawn = values(module)
    assert 0.15 < drawn["blocks.0.attention.qkv.weight"].std() < 0.25 and drawn["blocks.0.attention.output.weight"].std() < 0.02


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_own_classes_with_dropout_are_recomputed_to_the_bit(recompute):
    """The loss and all gradients are equal to those without recomputation. The block and the attention pass `samples` on."""
    model, (ids, targets, token_weights) = shape(**NAMED, qk_norm=True, **DROPOUT), on_rank.tokens()
    results = []
    for mode in ("none", recompute):
        module = PlainModule(gpt.layers(model, ALONE, SEED, VARIANTS, mode))
        scatter(module)
        loss = gpt.TokenLoss(model.vocab_size, 0.0, None)(module((ids, on_rank.SAMPLES)), (targets, token_weights))
        loss.backward()
        results.append((loss, gradients(module)))
    (loss, plain), (again, recomputed) = results
    assert torch.equal(loss, again) and all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_own_classes_are_decoded():
    """One token at a time with a KV cache, in rows of different lengths, gives the logits of the full forward pass to 1e-5 in fp32."""
    plain, decoder = filled(MODEL, variants=VARIANTS), Decoder(filled(MODEL, variants=VARIANTS), MODEL, ALONE, 2, LENGTH)
    assert decoder.uncached is None
    decoder.admit([[1, 2, 3], [4]])
    found = decoder.step([5, 6])
    for row, text in zip(found, ([1, 2, 3, 5], [4, 6]), strict=True):
        expected = logits_of(plain, MODEL, text)
        assert (row - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_own_classes_are_decoded_on_tensor_ranks():
    """The same logits with a driver and a worker as on one rank, to 1e-5 in fp32."""
    first, _ = run_ranks(decoding.carried_out_by_driver, 2, MODEL, VARIANTS)
    alone = decoding.carried_out(Decoder(filled(MODEL, variants=VARIANTS), MODEL, ALONE, 4, LENGTH))
    for found, expected in zip(first["logits"], alone["logits"], strict=True):
        assert abs(found - expected).max() <= 1e-5 * abs(expected).max()
