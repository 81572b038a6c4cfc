"""Writes our model settings as a config.json for transformers: the inverse of read_config.py. Does not import transformers.

Rotary settings are written in the form of transformers 4 (`rope_theta`, `rope_scaling`, `rotary_pct`), which version 5 also reads.
"""

from collections.abc import Callable
from typing import Any

from models.config import GPT
from models.conversion.read_config import FEED_FORWARDS, GATED_MLPS, NO_DROPOUT, PLAIN_MLPS
from models.encoder_config import BERT, T5, AnyModel

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "bert": "BertForPreTraining",
    "megatron-bert": "MegatronBertForPreTraining",
    "umt5": "UMT5ForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
}
"""Family -> transformers' class of a language model."""
DROPOUTS = {
    "gpt2": {"embedding_dropout": "embd_pdrop", "residual_dropout": "resid_pdrop", "attention_dropout": "attn_pdrop"},
    "gpt_neox": {"residual_dropout": "hidden_dropout", "attention_dropout": "attention_dropout"},
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), {"attention_dropout": "attention_dropout"}),
    **dict.fromkeys(
        ("bert", "megatron-bert"), {"residual_dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob"}
    ),
    "umt5": {"residual_dropout": "dropout_rate"},
}
"""Family -> {our dropout setting: theirs}."""


def architecture(model: AnyModel, family: str) -> str:
    """transformers' class of the model. One without a sentence head has another name."""
    name = ARCHITECTURES[family]
    return name.replace("ForPreTraining", "ForMaskedLM") if isinstance(model, BERT) and not model.sentence_head else name


def config(model: AnyModel, family: str, dtype: str, bos: int | None, eos: int | list[int] | None) -> dict[str, Any]:
    """The config.json of a model that `family` can express (mapping.family_of), with weights written as `dtype` ("float32", …)."""
    common = {
        "architectures": [architecture(model, family)],
        "model_type": family,
        "dtype": dtype,
        "torch_dtype": dtype,  # the same, for transformers 4
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "use_cache": True,
        "initializer_range": 0.02,
    }
    dropouts = {theirs: getattr(model, ours) for ours, theirs in DROPOUTS[family].items()}
    if isinstance(model, T5):  # a target begins with that token, as a text of a GPT may
        common["decoder_start_token_id"] = bos
    return common | WRITERS[family](model) | dropouts


def left_behind(model: AnyModel, family: str) -> list[str]:
    """The training settings that `family` cannot express, as text. They have no effect on trained weights."""
    dropouts = [name for name in NO_DROPOUT if name not in DROPOUTS[family] and getattr(model, name)]
    return [f"model.{name} = {getattr(model, name)!r}" for name in (*dropouts, "init")]


def _gpt2(model: GPT) -> dict[str, Any]:
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_heads,
        "n_inner": model.ffn_size,
        "n_positions": model.seq_length,
        "n_ctx": model.seq_length,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": _activation(model.mlp, PLAIN_MLPS),
        "scale_attn_weights": True,
    }


def _neox(model: GPT) -> dict[str, Any]:
    return _sizes(model) | {
        "layer_norm_eps": model.norm_eps,
        "hidden_act": _activation(model.mlp, PLAIN_MLPS),
        "use_parallel_residual": model.residual == "parallel",
        "attention_bias": model.qkv_bias,
        "rotary_pct": model.rotary_fraction,
        "rotary_emb_base": model.rotary_base,
        "rope_scaling": _scaling(model),
    }


def _llama(model: GPT) -> dict[str, Any]:
    return _llama_like(model) | {"attention_bias": model.qkv_bias, "mlp_bias": model.bias}


def _mistral(model: GPT) -> dict[str, Any]:
    return _llama_like(model) | {"sliding_window": None}


def _qwen2(model: GPT) -> dict[str, Any]:
    return _llama_like(model) | {"use_sliding_window": False}


def _qwen3(model: GPT) -> dict[str, Any]:
    return _llama_like(model) | {"attention_bias": model.qkv_bias, "use_sliding_window": False}


def _bert(model: BERT) -> dict[str, Any]:
    return _sizes(model) | {
        "type_vocab_size": model.token_types,
        "layer_norm_eps": model.norm_eps,
        "hidden_act": "gelu",
        "pad_token_id": None,  # transformers' own default, 0, would give the token 0 no gradient
    }


def _t5(model: T5) -> dict[str, Any]:
    return {
        "num_layers": model.num_encoder_layers,
        "num_decoder_layers": model.num_layers,
        "d_model": model.hidden_size,
        "num_heads": model.num_heads,
        "d_kv": model.head_size,
        "d_ff": model.ffn_size,
        "n_positions": max(model.source_length, model.seq_length),
        "relative_attention_num_buckets": model.relative_buckets,
        "relative_attention_max_distance": model.relative_distance,
        "layer_norm_epsilon": model.norm_eps,
        "feed_forward_proj": _activation(model.mlp, FEED_FORWARDS),
        "is_encoder_decoder": True,
    }


WRITERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "gpt2": _gpt2, "gpt_neox": _neox, "llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3,
    "bert": _bert, "megatron-bert": _bert, "umt5": _t5,
}  # fmt: skip
"""Family -> the function that writes its own settings."""


def _llama_like(model: GPT) -> dict[str, Any]:
    return _sizes(model) | {
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": _activation(model.mlp, GATED_MLPS),
        "rope_theta": model.rotary_base,
        "rope_scaling": _scaling(model),
    }


def _sizes(model: GPT | BERT) -> dict[str, Any]:
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.ffn_size,
        "max_position_embeddings": model.seq_length,
    }


def _activation(mlp: str, names: dict[str, str]) -> str:
    """The first of their names for our `mlp`."""
    return next(theirs for theirs, ours in names.items() if ours == mlp)


def _scaling(model: GPT) -> dict[str, Any] | None:
    if model.rotary_scaling == "linear":
        return {"rope_type": "linear", "factor": model.rotary_factor}
    if model.rotary_scaling == "llama3":
        return {
            "rope_type": "llama3",
            "factor": model.rotary_factor,
            "low_freq_factor": model.rotary_low_factor,
            "high_freq_factor": model.rotary_high_factor,
            "original_max_position_embeddings": model.rotary_original_length,
        }
    return None
