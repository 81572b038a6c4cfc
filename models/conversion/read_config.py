"""A transformers configuration of GPT-2, GPT-NeoX (Pythia) or Llama read as our settings. No transformers import.

It may come from a stranger: every value is of the type and in the range it must be, or a Mistake that names it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from models.config import GPT
from parallel.errors import Mistake

PLAIN_MLPS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu"}
GATED_MLPS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
"""Their activation -> our mlp."""

NO_DROPOUT = {"embedding_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0, "attention_dropout": 0.0}
"""How their weights are run on; theirs is a setting of a training that we do not continue."""
LARGEST = 2**40
"""Of a size; a tensor of it would be told apart from what the files hold long before."""
ROPE = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings",
}  # fmt: skip
"""What we read of a table of rotary settings."""


class ConfigReader:
    """A configuration, asked for one setting at a time; each answer has its type. Absent and null are the same."""

    def __init__(self, config: Any, name: str = "the transformers configuration") -> None:
        self.config, self.name = config, name

    def get(self, key: str, *default: Any) -> Any:
        """Whatever is there."""
        value = self.config.get(key) if isinstance(self.config, Mapping) else getattr(self.config, key, None)
        if value is None and not default:
            raise Mistake(f"{self.name} has no {key} → is it a whole config.json?")
        return default[0] if value is None else value

    def count(self, key: str, *default: int) -> int:
        """A whole number above 0."""
        value = self.get(key, *default)
        return self._fits(key, value, isinstance(value, int) and not isinstance(value, bool) and 0 < value < LARGEST, "a count")

    def number(self, key: str, *default: float) -> float:
        """A finite number above 0."""
        value = self.get(key, *default)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < LARGEST and math.isfinite(value)
        return self._fits(key, value, number, "a number above 0")

    def flag(self, key: str, *default: bool) -> bool:
        """True or False."""
        value = self.get(key, *default)
        return self._fits(key, value, isinstance(value, bool), "true or false")

    def word(self, key: str, *default: str) -> str:
        """Text."""
        value = self.get(key, *default)
        return self._fits(key, value, isinstance(value, str), "text")

    def table(self, key: str) -> "ConfigReader":
        """A table in it, empty where there is none."""
        value = self.get(key, {})
        return ConfigReader(self._fits(key, value, isinstance(value, Mapping), "a table"), f"{self.name}'s {key}")

    def _fits(self, key: str, value: Any, fits: bool, what: str) -> Any:
        if not fits:
            raise Mistake(f"{self.name} has {key} = {value!r:.60}, which is not {what} → is it a whole config.json?")
        return value


def settings(hf_config: Any) -> GPT:
    """Our settings of a transformers configuration, an object or config.json's dict. What GPT cannot say is a Mistake naming it.

    Left behind: dropout, how weights are drawn (`initializer_range`), token ids with a meaning, what only serves generation.
    """
    told = ConfigReader(hf_config)
    family = told.word("model_type")
    if family not in READERS:
        raise Mistake(f"model_type = {family!r:.60} is not a family we can read → use {', '.join(READERS)}")
    if told.get("quantization_config", None):
        raise Mistake("quantization_config is set: the weights are packed → take the model in float32, float16 or bfloat16")
    found = READERS[family](told) | dict(vocab_size=told.count("vocab_size"), init="gpt2", qk_norm=False, **NO_DROPOUT)
    try:
        return GPT(**found)
    except ValidationError as error:  # a sentence of GPT's own: each value alone is known to be right
        first = error.errors(include_url=False)[0]
        other = f"model.{first['loc'][-1]} = {first['input']!r:.60}: {first['msg']} → is it a whole config.json?" if first["loc"] else ""
        raise Mistake(other or str(first["ctx"]["error"])) from None


def _gpt2(told: ConfigReader) -> dict[str, Any]:
    for key, value in {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}.items():
        _require(key, told.get(key, value), value)
    width, heads = told.count("n_embd"), told.count("n_head")
    return dict(
        num_layers=told.count("n_layer"), hidden_size=width, num_heads=heads, num_kv_heads=heads,
        ffn_size=told.count("n_inner", 4 * width), seq_length=told.count("n_positions"), norm="layernorm",
        norm_eps=told.number("layer_norm_epsilon"), position="learned", mlp=_mlp("activation_function", told, PLAIN_MLPS),
        residual="pre_norm", bias=True, qkv_bias=True, tied=told.flag("tie_word_embeddings", True),
    )  # fmt: skip


def _neox(told: ConfigReader) -> dict[str, Any]:
    _require("attention_bias", told.get("attention_bias", True), True)  # False takes the biases from attention, not from the MLP
    width, heads = told.count("hidden_size"), told.count("num_attention_heads")
    rotary = _rotary(told, told.number("rotary_pct", 0.25))
    turned = int(width // heads * rotary["rotary_fraction"])
    if turned % 2:
        fraction = rotary["rotary_fraction"]
        raise Mistake(f"partial_rotary_factor = {fraction} turns {turned} features of a head, an odd number → only pairs turn here")
    return dict(
        num_layers=told.count("num_hidden_layers"), hidden_size=width, num_heads=heads, num_kv_heads=heads,
        ffn_size=told.count("intermediate_size"), seq_length=told.count("max_position_embeddings"),
        norm="layernorm", norm_eps=told.number("layer_norm_eps"), **rotary,
        mlp=_mlp("hidden_act", told, PLAIN_MLPS), residual="parallel" if told.flag("use_parallel_residual", True) else "pre_norm",
        bias=True, qkv_bias=True, tied=told.flag("tie_word_embeddings", False),
    )  # fmt: skip


def _llama(told: ConfigReader) -> dict[str, Any]:
    width, heads, bias = told.count("hidden_size"), told.count("num_attention_heads"), told.flag("attention_bias", False)
    _require("head_dim", told.get("head_dim", width // heads), width // heads)
    _require("mlp_bias", told.get("mlp_bias", False), bias)  # attention_bias is of q, k, v *and* the output: the MLP must be like it
    rotary = _rotary(told, 1.0)
    _require("partial_rotary_factor", rotary["rotary_fraction"], 1.0)
    return dict(
        num_layers=told.count("num_hidden_layers"), hidden_size=width, num_heads=heads,
        num_kv_heads=told.count("num_key_value_heads", heads), ffn_size=told.count("intermediate_size"),
        seq_length=told.count("max_position_embeddings"), norm="rmsnorm", norm_eps=told.number("rms_norm_eps"), **rotary,
        mlp=_mlp("hidden_act", told, GATED_MLPS), residual="pre_norm", bias=bias, qkv_bias=bias,
        tied=told.flag("tie_word_embeddings", False),
    )  # fmt: skip


READERS: dict[str, Callable[[ConfigReader], dict[str, Any]]] = {"gpt2": _gpt2, "gpt_neox": _neox, "llama": _llama}
"""transformers' `model_type` -> what reads its configuration."""


def _require(key: str, value: Any, only: Any) -> None:
    if value != only:
        raise Mistake(f"{key} = {value!r:.60} has no counterpart here → only {only!r} can be read")


def _mlp(key: str, told: ConfigReader, names: dict[str, str]) -> str:
    name = told.word(key)
    if name not in names:
        raise Mistake(f"{key} = {name!r:.60} has no counterpart here → only {', '.join(names)} can be read")
    return names[name]


def _rotary(told: ConfigReader, fraction: float) -> dict[str, Any]:
    """All rotary settings, from the one table of transformers 5 or the single settings of earlier files."""
    table = told.table("rope_parameters" if told.get("rope_parameters", None) else "rope_scaling")
    kind = table.word("rope_type", table.word("type", "default"))
    if kind not in SCALINGS:
        raise Mistake(f"rope_type = {kind!r:.60} has no counterpart here → only {', '.join(SCALINGS)} can be read")
    if unknown := sorted(map(str, set(table.config) - ROPE)):
        raise Mistake(f"{table.name} has {unknown[0]!r:.60}, which has no counterpart here → only {', '.join(sorted(ROPE))} can be read")
    return dict(
        position="rotary",
        rotary_fraction=table.number("partial_rotary_factor", told.number("partial_rotary_factor", fraction)),
        rotary_base=table.number("rope_theta", told.number("rope_theta", told.number("rotary_emb_base", 10_000.0))),
        **SCALINGS[kind](table, told),
    )


def _unscaled(table: ConfigReader, told: ConfigReader) -> dict[str, Any]:
    return dict(rotary_scaling="none")


def _linear(table: ConfigReader, told: ConfigReader) -> dict[str, Any]:
    return dict(rotary_scaling="linear", rotary_factor=table.number("factor"))


def _llama3(table: ConfigReader, told: ConfigReader) -> dict[str, Any]:
    length = table.count("original_max_position_embeddings", told.count("max_position_embeddings"))
    low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
    return dict(
        rotary_scaling="llama3", rotary_factor=table.number("factor"), rotary_low_factor=low, rotary_high_factor=high,
        rotary_original_length=length,
    )  # fmt: skip


SCALINGS: dict[str, Callable[[ConfigReader, ConfigReader], dict[str, Any]]] = {"default": _unscaled, "linear": _linear, "llama3": _llama3}
"""Their rope_type -> what reads the numbers that belong to it."""
