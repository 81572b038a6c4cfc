"""GGUF's names, forms and metadata against a reimplementation of llama.cpp's conversion."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from models.conversion import gguf, mapping, read_config
from parallel.errors import Mistake
from tests.models.helpers.build import shape, worst
from tests.models.helpers.conversion import to_hf

LLAMA = dict(position="rotary", norm="rmsnorm", mlp="swiglu", bias=False, qkv_bias=False, num_kv_heads=2)
METADATA = {
    "general.architecture": "llama", "llama.block_count": 30, "llama.context_length": 8192, "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536, "llama.attention.head_count": 9, "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100_000.0, "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06, "llama.vocab_size": 49_152,
    "llama.rope.dimension_count": 64,
}  # fmt: skip
"""The metadata of SmolLM2-135M."""
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""transformers' module -> GGUF's, as llama.cpp's gguf-py has them."""


def converted(theirs, model, architecture="llama"):
    """A transformers state dict as llama.cpp's convert_hf_to_gguf.py names it, and permutes q and k of a Llama."""
    found = {}
    for name, tensor in theirs.items():
        heads = {"q_proj": model.num_heads, "k_proj": model.num_kv_heads}.get(name.split(".")[-2])
        if heads and architecture == "llama":
            tensor = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        module, _, kind = name.rpartition(".")
        if module.startswith("model.layers."):
            _, _, number, rest = module.split(".", 3)
            found[f"blk.{number}.{NAMES[rest]}.{kind}"] = tensor
        else:
            found[f"{NAMES[module]}.{kind}"] = tensor
    return found


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"tied": False, "head_size": 12}),
        ("llama", {"bias": True, "qkv_bias": True}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen3", {"qk_norm": True, "head_size": 12}),
    ],
    ids=str,
)
def test_weights_of_llama_cpp_s_conversion_are_those_it_was_made_from(architecture, changes):
    model = shape(**LLAMA | changes)
    g = torch.Generator().manual_seed(0)
    ours = {name: torch.randn(size, generator=g) for name, size in mapping.shapes(model).items()}
    file = converted(to_hf(model, architecture, ours), model, architecture)
    plan = mapping.plan(model, gguf.GGUF_FAMILIES[architecture], {name: tuple(tensor.shape) for name, tensor in file.items()})
    found = {one.name: one.ours([file[key] for key in one.keys], model) for one in plan.parameters}
    assert worst(found, ours)[0] == 0
    back = {key: tensor for one in plan.parameters for key, tensor in one.theirs(found[one.name], model).items()}
    assert back.keys() == file.keys() and all(torch.equal(back[key], tensor) for key, tensor in file.items())


def test_metadata_are_settings():
    found = read_config.settings(gguf.config(METADATA, {"token_embd.weight"}, None))
    assert found == read_config.settings(
        LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            max_position_embeddings=8192, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    untied = gguf.config(METADATA, {"output.weight", "blk.0.attn_q.bias", "blk.0.ffn_up.bias"}, None)
    assert (read_config.settings(untied).tied, read_config.settings(untied).bias, read_config.settings(untied).qkv_bias) == (
        False,
        True,
        True,
    )


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factors_of_the_frequencies_are_llama_3_s_scaling(factor):
    """The factor by which transformers' frequencies are lower than unscaled ones, which llama.cpp stores in the file."""
    table = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    scaled = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=576, num_attention_heads=9, max_position_embeddings=131_072, rope_parameters=table)
    )
    plain = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=576, num_attention_heads=9, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    )
    factors = plain.inv_freq / scaled.inv_freq
    found = read_config.settings(gguf.config({**METADATA, "llama.rope.freq_base": 5e5}, {gguf.ROTARY_FACTORS}, factors))
    assert (found.rotary_scaling, found.rotary_original_length) == ("llama3", 8192)
    assert found.rotary_factor == pytest.approx(factor, rel=1e-6)
    with pytest.raises(Mistake, match="rope_freqs.weight are not Llama 3.1's"):
        gguf.config({**METADATA, "llama.rope.freq_base": 1e4}, {gguf.ROTARY_FACTORS}, factors)
    with pytest.raises(Mistake, match="rope_freqs.weight are not Llama 3.1's"):
        gguf.config(METADATA, {gguf.ROTARY_FACTORS}, torch.ones(3))


def test_linear_scaling():
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    found = read_config.settings(gguf.config({**METADATA, **linear}, set(), None))
    assert (found.rotary_scaling, found.rotary_factor) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("general.architecture", "phi3", "general.architecture = 'phi3' has no counterpart here → only llama, qwen2, qwen3 can be read"),
        ("general.architecture", 3, "general.architecture = 3, which is not text"),
        ("llama.expert_count", 8, "a mixture of experts has no counterpart"),
        ("llama.rope.dimension_count", 32, "llama.rope.dimension_count = 32 has no counterpart here → only 64"),
        ("llama.rope.scaling.type", "yarn", "llama.rope.scaling.type = 'yarn' has no counterpart"),
        ("llama.attention.value_length", 32, "llama.attention.value_length = 32 has no counterpart here → only 64"),
        ("llama.attention.sliding_window", 4096, "llama.attention.sliding_window = 4096 is shorter than llama.context_length = 8192"),
        ("llama.block_count", 10**30, "llama.block_count = 10+, which is not a count"),
        ("llama.embedding_length", None, "the GGUF file has no llama.embedding_length"),
    ],
)
def test_what_we_cannot_say_is_refused_by_name(key, value, words):
    with pytest.raises(Mistake, match=words):
        gguf.config({**METADATA, key: value}, set(), None)
