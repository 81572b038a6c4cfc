"""FLOPs against published formulas and against torch's own counter on built models."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.estimates.flops import forward_flops, training_flops
from models.gpt import layers
from parallel.grid import Grid
from parallel.layers import PlainModule
from tests.models.estimates.test_parameters import GPT2, LLAMA, NEOX, shape


@pytest.mark.parametrize(("depth", "hidden", "heads"), [(24, 2304, 24), (96, 12288, 96), (128, 25600, 160)])
def test_one_step_of_megatron(depth: int, hidden: int, heads: int) -> None:
    """72 B s l h² (1 + s/6h + V/12lh), arXiv:2104.04473's equation 3 without the forward pass that recomputation repeats."""
    s, vocab = 2048, 51200
    expected = 72 * s * depth * hidden**2 * (1 + s / (6 * hidden) + vocab / (12 * depth * hidden))
    assert s * (training_flops(shape(depth, hidden, heads, vocab, s, GPT2)) or 0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("family", [GPT2, NEOX, LLAMA | {"num_kv_heads": 2, "ffn_size": 96}, LLAMA | {"tied": True, "qk_norm": True}])
def test_equals_what_torch_counts(family: dict) -> None:
    """Forward, and forward with backward. torch counts the products of attention whole as well, if it writes them out."""
    model = shape(2, 64, 4, 101, 16, family)
    module = PlainModule(layers(model, Grid(), seed=1))
    ids = torch.arange(3 * model.seq_length).reshape(3, -1) % model.vocab_size
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        logits = module(ids)
    tokens = ids.numel()
    assert counted.get_total_flops() == tokens * (forward_flops(model) or 0)
    with counted:
        logits.sum().backward()
    assert counted.get_total_flops() == tokens * ((training_flops(model) or 0) - (forward_flops(model) or 0))


def test_the_length_of_the_text_counts_in_attention_alone() -> None:
    model = shape(2, 64, 4, 101, 16, GPT2)
    assert (forward_flops(model, 48) or 0) - (forward_flops(model) or 0) == 2 * 2 * 2 * 64 * 32


def test_a_variant_has_no_closed_form() -> None:
    assert forward_flops(shape(2, 64, 4, 101, 16, GPT2, mlp="variant:MyMLP")) is None
    assert training_flops(shape(2, 64, 4, 101, 16, GPT2, attention="variant:Mine")) is None
