"""A transformers configuration of GPT-2, GPT-NeoX (Pythia) or Llama read as our settings. No transformers import."""

from collections.abc import Callable, Mapping
from typing import Any

from models.config import GPT
from parallel.errors import Mistake

PLAIN_MLPS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu"}
GATED_MLPS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
"""Their activation -> our mlp."""

NO_DROPOUT = {"embedding_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0, "attention_dropout": 0.0}
"""How their weights are run on; theirs is a setting of a training that we do not continue."""

Get = Callable[..., Any]
"""(key) -> a setting of theirs, (key, default) -> the same where it may be absent."""


def settings(hf_config: Any) -> GPT:
    """Our settings of a transformers configuration, an object or config.json's dict. What GPT cannot say is a Mistake naming it.

    Left behind: dropout, how weights are drawn (`initializer_range`), token ids with a meaning, what only serves generation.
    """

    def get(key: str, *default: Any) -> Any:
        value = hf_config.get(key) if isinstance(hf_config, Mapping) else getattr(hf_config, key, None)
        if value is None and not default:
            raise Mistake(f"the transformers configuration has no {key} → is it a whole config.json?")
        return default[0] if value is None else value

    family = get("model_type")
    if family not in READERS:
        raise Mistake(f"model_type = {family!r} is not a family we can read → use {', '.join(READERS)}")
    return GPT(**READERS[family](get), vocab_size=get("vocab_size"), init="gpt2", qk_norm=False, **NO_DROPOUT)


def _gpt2(get: Get) -> dict[str, Any]:
    for key, value in {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}.items():
        _require(key, get(key, value), value)
    return dict(
        num_layers=get("n_layer"), hidden_size=get("n_embd"), num_heads=get("n_head"), num_kv_heads=get("n_head"),
        ffn_size=get("n_inner", 4 * get("n_embd")), seq_length=get("n_positions"), norm="layernorm",
        norm_eps=get("layer_norm_epsilon"), position="learned", mlp=_mlp("activation_function", get, PLAIN_MLPS), residual="pre_norm",
        bias=True, qkv_bias=True, tied=get("tie_word_embeddings", True),
    )  # fmt: skip


def _neox(get: Get) -> dict[str, Any]:
    _require("attention_bias", get("attention_bias", True), True)  # False takes the biases from attention, not from the MLP
    fraction, base = _rotary(get, default=0.25)
    turned = int(get("hidden_size") // get("num_attention_heads") * fraction)
    if turned % 2:
        raise Mistake(f"partial_rotary_factor = {fraction} turns {turned} features of a head, an odd number → only pairs turn here")
    return dict(
        num_layers=get("num_hidden_layers"), hidden_size=get("hidden_size"), num_heads=get("num_attention_heads"),
        num_kv_heads=get("num_attention_heads"), ffn_size=get("intermediate_size"), seq_length=get("max_position_embeddings"),
        norm="layernorm", norm_eps=get("layer_norm_eps"), position="rotary", rotary_fraction=fraction, rotary_base=base,
        mlp=_mlp("hidden_act", get, PLAIN_MLPS), residual="parallel" if get("use_parallel_residual", True) else "pre_norm",
        bias=True, qkv_bias=True, tied=get("tie_word_embeddings", False),
    )  # fmt: skip


def _llama(get: Get) -> dict[str, Any]:
    heads, bias = get("num_attention_heads"), get("attention_bias", False)
    _require("head_dim", get("head_dim", get("hidden_size") // heads), get("hidden_size") // heads)
    _require("mlp_bias", get("mlp_bias", False), bias)  # attention_bias is of q, k, v *and* the output: the MLP must be like it
    fraction, base = _rotary(get, default=1.0)
    _require("partial_rotary_factor", fraction, 1.0)
    return dict(
        num_layers=get("num_hidden_layers"), hidden_size=get("hidden_size"), num_heads=heads,
        num_kv_heads=get("num_key_value_heads", heads), ffn_size=get("intermediate_size"), seq_length=get("max_position_embeddings"),
        norm="rmsnorm", norm_eps=get("rms_norm_eps"), position="rotary", rotary_fraction=fraction, rotary_base=base,
        mlp=_mlp("hidden_act", get, GATED_MLPS), residual="pre_norm", bias=bias, qkv_bias=bias, tied=get("tie_word_embeddings", False),
    )  # fmt: skip


READERS: dict[str, Callable[[Get], dict[str, Any]]] = {"gpt2": _gpt2, "gpt_neox": _neox, "llama": _llama}
"""transformers' `model_type` -> what reads its configuration."""


def _require(key: str, value: Any, only: Any) -> None:
    if value != only:
        raise Mistake(f"{key} = {value!r} has no counterpart here → only {only!r} can be read")


def _mlp(key: str, get: Get, names: dict[str, str]) -> str:
    if get(key) not in names:
        raise Mistake(f"{key} = {get(key)!r} has no counterpart here → only {', '.join(names)} can be read")
    return names[get(key)]


def _rotary(get: Get, default: float) -> tuple[float, float]:
    """(fraction, base), from the one table of transformers 5 or the single settings of earlier files."""
    table = get("rope_parameters", None) or get("rope_scaling", {})
    _require("rope_type", table.get("rope_type", table.get("type", "default")), "default")
    fraction = table.get("partial_rotary_factor", get("partial_rotary_factor", get("rotary_pct", default)))
    return fraction, table.get("rope_theta", get("rope_theta", get("rotary_emb_base", 10_000.0)))
