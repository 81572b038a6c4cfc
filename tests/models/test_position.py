"""Position schemes against closed forms and transformers, in fp64 where the scheme's own tables (fp32) allow it."""

import math

import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from models.position import POSITIONS, alibi_slopes, scaled
from parallel.grid import Grid
from tests.harness import run_ranks
from tests.models.helpers import on_rank, reference
from tests.models.helpers.build import ALONE, LLAMA_3, fill, joined_part, parts, random_part, relative, shape, values, whole_model, worst


def scheme(position: str, grid: Grid = ALONE, **changes):
    model = shape(position=position, **changes)
    return POSITIONS[position]("position", model, parts(model).init, grid)


def queries_and_keys(length: int, heads: int = 4, size: int = 16, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(2, h, length, size, generator=g, dtype=torch.float64).to(dtype) for h in (heads, heads // 2))


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_rotary_is_transformers_own_to_the_bit(fraction, base):
    """For queries and (fewer) keys at 300 positions. The features behind the fraction are not rotated."""
    q, k = queries_and_keys(300)
    table = {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": fraction}
    config = GPTNeoXConfig(hidden_size=64, num_attention_heads=4, rope_parameters=table)
    theirs = apply_rotary_pos_emb(q, k, *GPTNeoXRotaryEmbedding(config)(q, torch.arange(300)[None]))
    ours = scheme("rotary", rotary_fraction=fraction, rotary_base=base).rotate(q, k)
    assert all(torch.equal(our, their) for our, their in zip(ours, theirs, strict=True))


SCALED = {
    "linear": (dict(rotary_scaling="linear", rotary_factor=4.0), {"factor": 4.0}),
    "llama3": (
        LLAMA_3,
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "llama3, 3.2": (
        LLAMA_3 | dict(rotary_factor=32.0, rotary_original_length=8192),
        {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    ),
}


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
@pytest.mark.parametrize("case", SCALED)
def test_scaled_rotary_is_transformers_own_to_the_bit(case, base):
    """At 600 positions. The rotation differs from that without scaling."""
    q, k = queries_and_keys(600)
    changes, table = SCALED[case]
    parameters = {"rope_type": changes["rotary_scaling"], "rope_theta": base, **table}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=16_384, rope_parameters=parameters)
    theirs = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(q, torch.arange(600)[None]))
    ours = scheme("rotary", rotary_base=base, **changes).rotate(q, k)
    assert all(torch.equal(our, their) for our, their in zip(ours, theirs, strict=True))
    assert relative(ours[0], scheme("rotary", rotary_base=base).rotate(q, k)[0]) > 0.1


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_llama_3_leaves_short_wavelengths_scales_long_ones_and_blends_between(base):
    """The three bands from their definition in fp64, for a head of 128 features with frequencies in each band."""
    length, factor = 8192, 8.0
    model = shape(hidden_size=128, num_heads=1, num_kv_heads=1, position="rotary", **LLAMA_3 | dict(rotary_original_length=length))
    frequencies = base ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    turns = length * frequencies / (2 * math.pi)  # of each pair in the original length
    blend = ((turns - 1) / (4 - 1)).clamp(0, 1)
    true = frequencies * blend + frequencies / factor * (1 - blend)
    assert relative(scaled(frequencies.float(), model), true) <= 1e-6
    assert (blend == 0).any() and (blend == 1).any() and ((blend > 0) & (blend < 1)).any()


def test_rotated_scores_depend_on_the_distance_alone():
    """The same query and key everywhere: q_t · k_u is a function of t − u (1e-5: angles are fp32), and not a constant one."""
    q, k = queries_and_keys(1)
    q, k = scheme("rotary").rotate(q.expand(-1, -1, 40, -1)[:, :2], k.expand(-1, -1, 40, -1))
    scores = q @ k.transpose(-1, -2)
    for distance in range(-39, 40):
        along = scores.diagonal(distance, -2, -1)
        assert (along - along[..., :1]).abs().max() <= 1e-5 * scores.abs().max()
    assert scores[0, 0, 0].std() > 0.1
    assert torch.allclose(q.norm(dim=-1), q[:, :, :1].norm(dim=-1), rtol=1e-6)  # a rotation


def test_rotary_tables_stay_fp32_in_a_bf16_model():
    """At position 999 an angle rounded to bf16 would be off by radians. Here only factors and products are rounded: 2 %."""
    q, k = queries_and_keys(1000, dtype=torch.bfloat16)
    t, i = torch.arange(1000, dtype=torch.float64), torch.arange(8, dtype=torch.float64)
    turn = torch.polar(torch.ones(1000, 8, dtype=torch.float64), torch.outer(t, 10_000.0 ** (-i / 8)))
    for ours, x in zip(scheme("rotary").bfloat16().rotate(q, k), (q.double(), k.double()), strict=True):
        true = torch.complex(x[..., :8], x[..., 8:]) * turn
        assert ours.dtype == torch.bfloat16
        assert relative(ours[:, :, 900:], torch.cat([true.real, true.imag], -1)[:, :, 900:]) <= 0.02


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 2**-8)])
def test_sinusoidal_is_the_closed_form(dtype, tolerance):
    """sin and cos alternate. Angles are fp32, up to 999 ± 3e-5, in a bf16 model too."""
    true = torch.tensor([[(math.cos if j % 2 else math.sin)(t / 10_000 ** ((j - j % 2) / 32)) for j in range(32)] for t in range(1000)])
    found = scheme("sinusoidal").to(dtype)(torch.zeros(1, 1000, 32, dtype=dtype))[0]
    assert found.dtype == dtype
    assert (found.double() - true).abs().max() <= tolerance


def test_sinusoidal_is_added_to_what_comes_in():
    x = torch.randn(2, 5, 32)
    assert torch.allclose(scheme("sinusoidal")(x) - x, scheme("sinusoidal")(torch.zeros_like(x)), atol=1e-6)


def test_learned_adds_its_first_rows():
    position, x = scheme("learned"), torch.randn(2, 5, 32)
    assert torch.equal(position(x), x + position.weight[:5])
    assert position.weight.shape == (16, 32)


@pytest.mark.parametrize("heads", [1, 4, 6, 8, 12, 20])
def test_alibi_slopes_are_bloom_s(heads):
    """transformers' tensor at position 1 is the slope, in fp32."""
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    assert relative(torch.tensor(alibi_slopes(heads)), theirs) <= 1e-6


def test_alibi_slopes_of_eight_heads_are_the_paper_s():
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]


def test_alibi_is_rounded_once_in_a_bf16_model():
    """Computed in fp32, the bias of 1,000 positions is the nearest bf16, not a product of two rounded factors."""
    q, alibi = torch.zeros(1, 12, 1000, 8), scheme("alibi", num_heads=12, num_kv_heads=12, hidden_size=96)
    exact, low = alibi.bias(q), alibi.bfloat16().bias(q.bfloat16())
    assert exact.dtype == torch.float32
    assert torch.equal(low, exact.bfloat16())


@pytest.mark.parametrize("tensor", [1, 2])
def test_attention_with_alibi_uses_the_slopes_of_all_heads(tensor):
    """Against an explicit softmax with transformers' slopes, in fp64: outputs and gradients to 1e-12 with 8, 6 and 12 heads.

    1e-7 for twelve heads, four of whose slopes are irrational and therefore rounded to fp32.
    """
    models = [shape(position="alibi", num_heads=heads, num_kv_heads=heads, hidden_size=8 * heads) for heads in (8, 6, 12)]
    problems = [random_part("attention", model) for model in models]
    ranks = run_ranks(on_rank.run_parts, tensor, [("attention", model, *problem) for model, problem in zip(models, problems, strict=True)])
    for i, (model, (weights, x, dy)) in enumerate(zip(models, problems, strict=True)):
        slopes = build_alibi_tensor(torch.ones(1, 2), model.num_heads, torch.float32)[:, 0, 1].double()

        def attention(x, w, model=model, slopes=slopes):
            return reference.attention(x, w, "attention", model, slopes)

        true = reference.with_gradients(attention, x, weights, dy)
        tolerance = 1e-7 if model.num_heads == 12 else 1e-12
        assert worst(joined_part("attention", model, [rank[i] for rank in ranks]), true)[0] <= tolerance


@pytest.mark.parametrize("position", POSITIONS)
def test_nothing_is_kept_that_a_precision_could_round(position):
    """No buffers; only a learned table has weights."""
    model = whole_model(shape(position=position))
    assert not list(model.buffers())
    assert [name for name in values(model) if "position" in name] == (["position.weight"] if position == "learned" else [])


@pytest.mark.parametrize("position", POSITIONS)
def test_the_order_of_tokens_matters_unless_there_is_none(position):
    """If two earlier tokens are swapped, the last logits differ, except without positions (with one layer: deeper ones see the order)."""
    model = whole_model(shape(position=position, num_layers=1)).double()
    fill(model, {name: 20 * tensor if tensor.dim() > 1 else tensor for name, tensor in values(model).items()})
    ids = torch.arange(10)[None]
    swapped = ids[:, [1, 0, *range(2, 10)]]
    assert (relative(model(swapped)[:, -1], model(ids)[:, -1]) < 1e-12) == (position == "none")
