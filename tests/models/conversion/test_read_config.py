"""transformers' configurations read as our settings: what is read, what is refused, and the messages."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from models.config import GPT
from models.conversion.read_config import DEFAULTS, settings
from models.estimates.parameters import parameters
from models.position import scaled
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
QWEN3 = dict(
    model_type="qwen3", attention_bias=False, head_dim=128, hidden_act="silu", hidden_size=1024, intermediate_size=3072,
    max_position_embeddings=40960, max_window_layers=28, num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8,
    rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000, sliding_window=None, tie_word_embeddings=True, use_sliding_window=False,
    vocab_size=151936,
)  # fmt: skip
"""The configuration of Qwen3 0.6B."""


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


def test_qwen3_as_published():
    found = settings(QWEN3)
    assert (found.head_size, found.hidden_size, found.num_heads, found.num_kv_heads) == (128, 1024, 16, 8)
    assert (found.qk_norm, found.qkv_bias, found.output_bias, found.bias, found.tied) == (True, False, False, False, True)
    assert parameters(found) == 596_049_920


def test_qwen2_5_and_mistral_as_published():
    """Qwen2.5 0.5B and Mistral 7B v0.3: as many parameters as released."""
    qwen = dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, max_position_embeddings=32768, max_window_layers=21,
                num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6,
                sliding_window=32768, tie_word_embeddings=True, use_sliding_window=False, vocab_size=151936)  # fmt: skip
    assert (settings(qwen).qkv_bias, settings(qwen).output_bias, parameters(settings(qwen))) == (True, False, 494_032_768)
    mistral = dict(model_type="mistral", max_position_embeddings=32768, rope_theta=1e6, sliding_window=None, vocab_size=32768)
    assert parameters(settings(mistral)) == 7_248_023_552


def test_where_llama_3_names_no_original_length_it_is_the_longest_text():
    table = {key: value for key, value in LLAMA["rope_scaling"].items() if key != "original_max_position_embeddings"}
    assert settings({**LLAMA, "rope_scaling": table}).rotary_original_length == 131_072


@pytest.mark.parametrize("family", DEFAULTS)
def test_a_key_that_is_not_there_has_transformers_default(family):
    """Every default that we know is transformers' own, and each key that is missing, or null, is read as transformers reads it."""
    theirs = AutoConfig.for_model(family).to_dict()
    assert {key: theirs[key] for key in DEFAULTS[family] if "sliding" not in key} == {
        key: value for key, value in DEFAULTS[family].items() if "sliding" not in key
    }
    whole = theirs | dict(sliding_window=None)
    for key in DEFAULTS[family].keys() - {"sliding_window"}:
        without = {name: value for name, value in whole.items() if name != key}
        assert settings(without) == settings(whole), key
        if key != "num_key_value_heads":
            assert settings({**without, key: None}) == settings(whole), key
    assert settings({"model_type": family, "sliding_window": None}) == settings(whole)


def test_no_kv_heads_are_as_many_as_heads_where_no_key_is_another_number():
    mistral = {"model_type": "mistral", "sliding_window": None}
    assert (settings(mistral).num_kv_heads, settings({**mistral, "num_key_value_heads": None}).num_kv_heads) == (8, 32)


LLAMA_2 = {"model_type": "llama", "max_position_embeddings": 64}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONTRADICTIONS = {
    "two tables": LLAMA_2 | dict(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, rope_scaling={"rope_type": "linear", "factor": 4.0, "rope_theta": 2e4}
    ),
    "an empty table and another": LLAMA_2 | dict(rope_scaling={}, rope_parameters={"rope_type": "linear", "factor": 4.0}, rope_theta=3e4),
    "a base in and beside the table": LLAMA_2 | dict(rope_scaling={"type": "linear", "factor": 4.0, "rope_theta": 2e4}, rope_theta=3e4),
    "an original length in and beside the table": LLAMA_2 | dict(
        rope_scaling=SCALED | dict(original_max_position_embeddings=16), original_max_position_embeddings=32
    ),
    "an original length beside the table": LLAMA_2 | dict(rope_scaling=SCALED, original_max_position_embeddings=32),
    "a fraction that only others read": LLAMA_2 | dict(partial_rotary_factor=0.5),
    "a base and a fraction under other families' names": {
        "model_type": "gpt_neox", "rope_theta": 5e4, "rotary_emb_base": 2e4, "partial_rotary_factor": 0.5, "rotary_pct": 0.25,
    },
    "a table without a fraction": {"model_type": "gpt_neox", "rope_scaling": {"type": "linear", "factor": 2.0}, "rotary_pct": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_where_rotary_settings_contradict_each_other_they_are_read_as_transformers_reads_them(case):
    """The frequencies that our settings give are those of transformers' own module, to the bit."""
    table = CONTRADICTIONS[case]
    theirs = AutoConfig.for_model(**copy.deepcopy(table))
    module = LlamaRotaryEmbedding if table["model_type"] == "llama" else GPTNeoXRotaryEmbedding
    model = settings(table)
    turned = int(model.head_size * model.rotary_fraction)
    found = scaled(1.0 / model.rotary_base ** (torch.arange(0, turned, 2, dtype=torch.float32) / turned), model)
    assert torch.equal(found, module(theirs).inv_freq)


HOSTILE = [None, "16", -1, 0, 1.5, True, float("nan"), float("inf"), 2**80, [], {}, {"a": 1}, [[]]]


@pytest.mark.parametrize("config", [GPT2Config(), LLAMA, PYTHIA_70M, QWEN3], ids=["gpt2", "llama", "gpt_neox", "qwen3"])
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
        (GPTNeoXConfig(hidden_size=48, num_attention_heads=4), "partial_rotary_factor = 0.25 turns 3 features of a head, an odd number"),
        (
            MistralConfig(),
            "sliding_window = 4096 is shorter than max_position_embeddings = 131072: .* → set max_position_embeddings to 4096",
        ),
        ({"model_type": "mistral"}, "sliding_window = 4096 is shorter than max_position_embeddings = 131072"),
        (Qwen2Config(use_sliding_window=True), "sliding_window = 4096 is shorter than max_position_embeddings = 32768"),
        (Qwen3Config(use_sliding_window=True, layer_types=["sliding_attention"] * 32), "sliding_window = 4096 is shorter than"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 has no counterpart here → only 1.0"),
        (LlamaConfig(hidden_act="relu"), "hidden_act = 'relu' has no counterpart here → only silu, swish, gelu"),
        (
            LlamaConfig(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type = 'yarn' has no counterpart here → only default, linear, llama3 can be read",
        ),
        (
            {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.0, "scale": 3}},
            "rope_scaling has 'scale', which has no counterpart",
        ),
        (
            {**LLAMA, "rope_scaling": None, "rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters has 'full_attention', which has no",
        ),
        ({**LLAMA, "rope_scaling": {"rope_type": "linear"}}, "the transformers configuration's rope_scaling has no factor"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, "quantization_config is set: the weights are packed"),
        ({**PYTHIA_70M, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic' has no counterpart"),
        ({**PYTHIA_70M, "model_type": "bloom"}, "model_type = 'bloom' is not a family we can read → use gpt2, gpt_neox, llama, mistral, "),
        ({}, "the transformers configuration has no model_type"),
    ],
)
def test_what_we_cannot_say_is_refused_by_name(config, words):
    with pytest.raises(Mistake, match=words):
        settings(config)
