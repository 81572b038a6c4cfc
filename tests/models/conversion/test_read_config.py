"""transformers' configurations read as our settings: what is read, what is refused, and the messages."""

import json

import pytest
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig

from models.config import GPT
from models.conversion.read_config import settings
from parallel.errors import Mistake

GPT2_SMALL = GPT(
    num_layers=12, hidden_size=768, num_heads=12, num_kv_heads=12, ffn_size=3072, vocab_size=50257, seq_length=1024, norm="layernorm",
    norm_eps=1e-5, position="learned", mlp="gelu_tanh", residual="pre_norm", init="gpt2", bias=True, qkv_bias=True, qk_norm=False,
    embedding_dropout=0.0, residual_dropout=0.0, mlp_dropout=0.0, attention_dropout=0.0,
    tied=True,
)  # fmt: skip
PYTHIA_70M = dict(
    model_type="gpt_neox", hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048, vocab_size=50304,
    max_position_embeddings=2048, hidden_act="gelu", layer_norm_eps=1e-5, rotary_pct=0.25, rotary_emb_base=10000,
    use_parallel_residual=True, tie_word_embeddings=False,
)  # fmt: skip
"""As in its config.json, which was written by an earlier transformers."""
LLAMA = dict(
    model_type="llama", hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
    intermediate_size=8192, vocab_size=128_256, max_position_embeddings=131_072, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=500_000.0,
    tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
    rope_scaling={
        "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
)  # fmt: skip
"""The configuration of Llama 3.2 1B, as written by transformers 4."""


def test_gpt2_as_published():
    assert settings(GPT2Config()) == GPT2_SMALL


def test_pythia_as_published_in_the_words_of_an_earlier_transformers():
    found = settings(PYTHIA_70M)
    assert (found.rotary_fraction, found.rotary_base, found.residual, found.mlp) == (0.25, 10_000, "parallel", "gelu")
    assert found == settings(GPTNeoXConfig(**{key: value for key, value in PYTHIA_70M.items() if key != "model_type"}))


def test_llama_2_as_published():
    found = settings(LlamaConfig())
    assert (found.hidden_size, found.ffn_size, found.num_kv_heads, found.norm, found.mlp) == (4096, 11008, 32, "rmsnorm", "swiglu")
    assert (found.rotary_fraction, found.rotary_base, found.bias, found.qkv_bias, found.tied) == (1.0, 10_000.0, False, False, False)


def test_llama_3_2_as_published_in_the_words_of_an_earlier_transformers():
    found = settings(LLAMA)
    assert (found.num_kv_heads, found.head_size, found.tied, found.rotary_base) == (8, 64, True, 5e5)
    assert (found.rotary_scaling, found.rotary_factor, found.rotary_original_length) == ("llama3", 32.0, 8192)
    assert (found.rotary_low_factor, found.rotary_high_factor) == (1.0, 4.0)
    assert found == settings(LlamaConfig(**{key: value for key, value in LLAMA.items() if key != "model_type"}))


def test_where_llama_3_names_no_original_length_it_is_the_longest_text():
    table = {key: value for key, value in LLAMA["rope_scaling"].items() if key != "original_max_position_embeddings"}
    assert settings({**LLAMA, "rope_scaling": table}).rotary_original_length == 131_072


HOSTILE = [None, "16", -1, 0, 1.5, True, float("nan"), float("inf"), 2**80, [], {}, {"a": 1}, [[]]]


@pytest.mark.parametrize("config", [GPT2Config(), LLAMA, PYTHIA_70M], ids=["gpt2", "llama", "gpt_neox"])
def test_whatever_stands_where_a_setting_was_is_a_mistake_or_a_setting(config):
    """Each key in turn gets a value of another type: there is no other exception, and no endless loop."""
    whole = config if isinstance(config, dict) else json.loads(config.to_json_string(use_diff=False))
    refused = 0
    for key in whole:
        for value in HOSTILE:
            try:
                settings({**whole, key: value})
            except Mistake as mistake:
                refused += 1
                assert "→" in str(mistake) and "\n" not in str(mistake) and len(str(mistake)) < 400, mistake
    assert refused > 8 * len(HOSTILE)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("n_embd", "768", "n_embd = '768', which is not a count"),
        ("n_layer", float("nan"), "n_layer = nan, which is not a count"),
        ("n_head", True, "n_head = True, which is not a count"),
        ("n_head", 7, "model.num_heads = 7 does not divide model.hidden_size = 768"),
        ("layer_norm_epsilon", "1e-5", "layer_norm_epsilon = '1e-5', which is not a number above 0"),
        ("activation_function", ["gelu"], r"activation_function = \['gelu'\], which is not text"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings = 'yes', which is not true or false"),
        ("model_type", {}, "model_type = {}, which is not text"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(key, value, words):
    with pytest.raises(Mistake, match=words):
        settings({**json.loads(GPT2Config().to_json_string(use_diff=False)), key: value})


@pytest.mark.parametrize("config", [GPT2Config(), GPTNeoXConfig(), LlamaConfig()], ids=lambda config: config.model_type)
def test_an_object_and_its_json_are_the_same(config):
    assert settings(json.loads(config.to_json_string(use_diff=False))) == settings(config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPT2Config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True has no counterpart here → only False"),
        (GPT2Config(scale_attn_weights=False), "scale_attn_weights = False has no counterpart"),
        (GPT2Config(add_cross_attention=True), "add_cross_attention = True has no counterpart"),
        (GPT2Config(activation_function="silu"), "activation_function = 'silu' has no counterpart here → only gelu, "),
        (GPTNeoXConfig(attention_bias=False), "attention_bias = False has no counterpart"),
        (GPTNeoXConfig(hidden_size=48, num_attention_heads=4), "partial_rotary_factor = 0.25 turns 3 features of a head, an odd number"),
        (LlamaConfig(attention_bias=True), "mlp_bias = False has no counterpart here → only True"),
        (LlamaConfig(mlp_bias=True), "mlp_bias = True has no counterpart here → only False"),
        (LlamaConfig(head_dim=64), "head_dim = 64 has no counterpart here → only 128"),
        (LlamaConfig(hidden_act="relu"), "hidden_act = 'relu' has no counterpart here → only silu, swish, gelu"),
        (
            LlamaConfig(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type = 'yarn' has no counterpart here → only default, linear, llama3 can be read",
        ),
        (
            {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.0, "scale": 3}},
            "rope_scaling has 'scale', which has no counterpart",
        ),
        ({**LLAMA, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters has 'full_attention', which has no"),
        ({**LLAMA, "rope_scaling": {"rope_type": "linear"}}, "the transformers configuration's rope_scaling has no factor"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, "quantization_config is set: the weights are packed"),
        ({**PYTHIA_70M, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic' has no counterpart"),
        ({**PYTHIA_70M, "model_type": "bloom"}, "model_type = 'bloom' is not a family we can read → use gpt2, gpt_neox, llama"),
        ({"model_type": "gpt2"}, "the transformers configuration has no n_embd"),
        ({}, "the transformers configuration has no model_type"),
    ],
)
def test_what_we_cannot_say_is_refused_by_name(config, words):
    with pytest.raises(Mistake, match=words):
        settings(config)
