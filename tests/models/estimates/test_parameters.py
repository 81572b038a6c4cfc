"""Parameter counts against published exact figures and against built models."""

import itertools
from typing import Any

import pytest

from models.config import GPT
from models.estimates.parameters import parameters, parameters_on_rank
from models.gpt import layers
from parallel.grid import Grid
from parallel.layers import PlainModule, unique_parameters

GPT2: dict[str, Any] = {
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "position": "learned",
    "mlp": "gelu",
    "residual": "pre_norm",
    "init": "gpt2",
    "bias": True,
    "qkv_bias": True,
    "qk_norm": False,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
    "mlp_dropout": 0.0,
    "attention_dropout": 0.0,
    "tied": True,
}
ROTARY = {"position": "rotary", "rotary_fraction": 0.25, "rotary_base": 10000.0, "rotary_scaling": "none"}
NEOX = GPT2 | ROTARY | {"residual": "parallel", "tied": False}
LLAMA = GPT2 | {
    "norm": "rmsnorm",
    "position": "rotary",
    "rotary_fraction": 1.0,
    "rotary_base": 10000.0,
    "rotary_scaling": "none",
    "mlp": "swiglu",
    "bias": False,
    "qkv_bias": False,
    "tied": False,
}


def shape(depth: int, hidden: int, heads: int, vocab: int, seq: int, family: dict[str, Any], **changes: Any) -> GPT:
    sizes = {"num_layers": depth, "hidden_size": hidden, "num_heads": heads, "num_kv_heads": heads, "ffn_size": 4 * hidden}
    return GPT(**{**sizes, "vocab_size": vocab, "seq_length": seq, **family, **changes})


@pytest.mark.parametrize(
    ("depth", "hidden", "heads", "vocab", "expected"),
    [
        (40, 1536, 16, 51200, 1_213_479_936),  # Megatron, arXiv:1909.08053
        (54, 1920, 20, 51200, 2_490_408_960),
        (64, 2304, 24, 51200, 4_199_109_120),
        (72, 3072, 32, 51200, 8_317_040_640),
        (12, 768, 12, 50257, 124_439_808),  # GPT-2, as its released weights count
        (24, 1024, 16, 50257, 354_823_168),
        (36, 1280, 20, 50257, 774_030_080),
        (48, 1600, 25, 50257, 1_557_611_200),
    ],
)
def test_gpt2_and_megatron(depth: int, hidden: int, heads: int, vocab: int, expected: int) -> None:
    assert parameters(shape(depth, hidden, heads, vocab, 1024, GPT2)) == expected


@pytest.mark.parametrize(
    ("depth", "hidden", "heads", "vocab", "expected"),
    [
        (44, 6144, 64, 50432, 20_554_567_680),  # GPT-NeoX-20B
        (12, 768, 12, 50304, 162_322_944),  # Pythia
        (24, 1024, 16, 50304, 405_334_016),
        (16, 2048, 8, 50304, 1_011_781_632),
        (32, 2560, 32, 50304, 2_775_208_960),
        (32, 4096, 32, 50432, 6_857_302_016),
    ],
)
def test_neox_and_pythia(depth: int, hidden: int, heads: int, vocab: int, expected: int) -> None:
    assert parameters(shape(depth, hidden, heads, vocab, 2048, NEOX)) == expected


def test_llama_2_7b_and_llama_3_8b() -> None:
    """As released: 6,738,415,616 and, with 8 kv heads, 8,030,261,248."""
    assert parameters(shape(32, 4096, 32, 32000, 4096, LLAMA, ffn_size=11008)) == 6_738_415_616
    assert parameters(shape(32, 4096, 32, 128256, 8192, LLAMA, ffn_size=14336, num_kv_heads=8)) == 8_030_261_248


def test_two_tensor_ranks_hold_the_replicated_parameters_twice() -> None:
    """GPT-NeoX-20B summed over two tensor ranks, as its checkpoints count."""
    assert 2 * (parameters_on_rank(shape(44, 6144, 64, 50432, 2048, NEOX), 2) or 0) == 20_556_201_984


def test_vocabulary_padding_is_on_the_rank_and_not_in_the_model() -> None:
    odd = shape(2, 64, 4, 101, 16, GPT2)
    assert parameters(odd) == (parameters(shape(2, 64, 4, 102, 16, GPT2)) or 0) - 64
    assert parameters_on_rank(odd, 2) == parameters_on_rank(shape(2, 64, 4, 102, 16, GPT2), 2)


def test_a_variant_has_no_closed_form() -> None:
    assert parameters(shape(2, 64, 4, 101, 16, GPT2, norm="variant:MyNorm")) is None
    assert parameters_on_rank(shape(2, 64, 4, 101, 16, GPT2, mlp="variant:MyMLP"), 1) is None


CHOICES = list(
    itertools.product(
        ("layernorm", "rmsnorm"),
        ("learned", "alibi"),
        ("gelu", "swiglu"),
        ("pre_norm", "post_norm", "parallel"),
        (True, False),
        (True, False),
    )
)


@pytest.mark.parametrize(("norm", "position", "mlp", "residual", "flag", "tied"), CHOICES)
def test_the_built_model_has_as_many(norm: str, position: str, mlp: str, residual: str, flag: bool, tied: bool) -> None:
    settings = {"norm": norm, "position": position, "mlp": mlp, "residual": residual, "bias": flag, "qk_norm": flag, "qkv_bias": not flag}
    settings |= {"head_size": 10, "output_bias": not flag} if tied else {}
    model = shape(2, 24, 4, 11, 8, GPT2, **settings, tied=tied, num_kv_heads=2, ffn_size=40)
    built = PlainModule(layers(model, Grid(), seed=0))
    assert parameters(model) == sum(parameter.numel() for _, parameter in unique_parameters(built))
