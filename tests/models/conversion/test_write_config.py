"""The config.json that we write: transformers and our own reader read the same model from it."""

import json

import pytest
from transformers import AutoConfig

from models.conversion import mapping, read_config
from models.conversion.write_config import config, left_behind
from parallel.errors import Mistake
from tests.models.conversion.test_mapping import CONFIGS
from tests.models.helpers.build import LLAMA_3, shape

LLAMA_LIKE = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "rms_norm_eps",
    "max_position_embeddings", "hidden_act", "head_dim", "rope_parameters",
)  # fmt: skip
SCIENCE = {
    "gpt2": ("n_layer", "n_embd", "n_head", "n_positions", "layer_norm_epsilon", "activation_function"),
    "gpt_neox": ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings",
                 "layer_norm_eps", "hidden_act", "use_parallel_residual", "rope_parameters", "attention_bias"),
    "llama": (*LLAMA_LIKE, "attention_bias", "mlp_bias"),
    "mistral": (*LLAMA_LIKE, "sliding_window"),
    "qwen2": tuple(name for name in LLAMA_LIKE if name != "head_dim"),
    "qwen3": (*LLAMA_LIKE, "attention_bias"),
}  # fmt: skip
"""The settings that affect what a model computes."""


def written(model, family, **changes):
    return json.loads(json.dumps(config(model, family, **{"dtype": "float32", "bos": 0, "eos": 0} | changes), allow_nan=False))


@pytest.mark.parametrize("case", CONFIGS)
def test_transformers_reads_what_was_meant(case, tmp_path):
    theirs, family = CONFIGS[case], CONFIGS[case].model_type
    (tmp_path / "config.json").write_text(json.dumps(written(read_config.settings(theirs), family)))
    found = AutoConfig.from_pretrained(tmp_path)
    assert type(found) is type(theirs)
    for name in (*SCIENCE[family], "vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id"):
        assert getattr(found, name) == getattr(theirs, name), name
    assert read_config.settings(found) == read_config.settings(theirs)


@pytest.mark.parametrize("case", CONFIGS)
def test_we_read_what_we_wrote(case):
    model = read_config.settings(CONFIGS[case])
    assert read_config.settings(written(model, CONFIGS[case].model_type)) == model
    found = mapping.family_of(model)
    assert found == CONFIGS[case].model_type or (found, CONFIGS[case].model_type) == ("llama", "mistral")  # which is a Llama then


def test_dropout_is_theirs_where_they_have_a_word_for_it_and_told_where_not():
    model = shape(embedding_dropout=0.1, residual_dropout=0.2, mlp_dropout=0.3, attention_dropout=0.4, init="small_wang")
    found = written(model, "gpt2", eos=[0, 7])
    assert (found["embd_pdrop"], found["resid_pdrop"], found["attn_pdrop"], found["eos_token_id"]) == (0.1, 0.2, 0.4, [0, 7])
    assert left_behind(model, "gpt2") == ["model.mlp_dropout = 0.3", "model.init = 'small_wang'"]
    assert left_behind(shape(), "llama") == ["model.init = 'gpt2'"]


NO_FAMILY = [
    (dict(qk_norm=True), ["model.qk_norm = True is no gpt2 → that has False"]),
    (dict(norm="variant:Mine"), ["model.norm = 'variant:Mine' is no gpt2 → that has 'layernorm'"]),
    (dict(attention="variant:Mine"), ["model.attention = 'variant:Mine' is no gpt2 → that has 'softmax'"]),
    (dict(mlp="relu2"), ["model.mlp = 'relu2' is no gpt2"]),
    (dict(position="alibi", qk_norm=True), ["model.position = 'alibi' is no", "model.qk_norm = True is no"]),
    (
        dict(position="rotary", norm="rmsnorm", mlp="swiglu", bias=False, output_bias=True, qkv_bias=False),
        ["model.qkv_bias = False with model.output_bias = True is no llama"],
    ),
    (dict(position="rotary", rotary_fraction=0.4), ["model.rotary_fraction = 0.4 of 8 features, an odd number, is no gpt_neox"]),
]


@pytest.mark.parametrize(("changes", "words"), NO_FAMILY)
def test_a_model_of_no_family_is_told_every_setting_that_is_in_the_way(changes, words):
    with pytest.raises(Mistake) as caught:
        mapping.family_of(shape(**changes))
    assert all(word in str(caught.value) for word in words), caught.value
    assert str(caught.value).count(" is no ") == len(words)


def test_each_family_is_found():
    assert mapping.family_of(shape()) == "gpt2"
    assert mapping.family_of(shape(position="rotary", residual="parallel")) == "gpt_neox"
    llama = dict(position="rotary", norm="rmsnorm", mlp="geglu", bias=False, qkv_bias=False, num_kv_heads=2)
    assert mapping.family_of(shape(**llama, **LLAMA_3)) == "llama"
    assert mapping.family_of(shape(**llama | dict(hidden_size=30, head_size=8))) == "mistral"
    assert mapping.family_of(shape(**llama | dict(qkv_bias=True))) == "qwen2"
    assert mapping.family_of(shape(**llama | dict(qk_norm=True, head_size=12))) == "qwen3"
