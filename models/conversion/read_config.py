"""Reads a transformers config.json of GPT-2, GPT-NeoX (Pythia) or Llama as our model settings. Does not import transformers.

The file may come from an untrusted source: a value of the wrong type or out of range is a Mistake that names it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from models.config import GPT
from parallel.errors import Mistake

PLAIN_MLPS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu"}
GATED_MLPS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
"""Their activation -> our mlp, for models without and with a gate."""

NO_DROPOUT = {"embedding_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0, "attention_dropout": 0.0}
"""Imported models get no dropout. Theirs belongs to a training that we do not continue."""
LARGEST = 2**40
"""Numbers must be below this. No file holds a tensor of such a size."""
ROPE = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings",
}  # fmt: skip
"""The keys of a table of rotary settings that are read. Others are refused."""
SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3"}
"""Their rope_type -> our rotary_scaling."""


class ConfigReader:
    """Reads single values of a configuration and checks their types. A missing value and null are the same.

    Each method takes the default as an optional second argument. Without one, a missing value is a Mistake.
    """

    def __init__(self, config: Any, name: str = "the transformers configuration") -> None:
        self.config, self.name = config, name

    def get(self, key: str, *default: Any) -> Any:
        """The value, of any type."""
        value = self.config.get(key) if isinstance(self.config, Mapping) else getattr(self.config, key, None)
        if value is None and not default:
            raise Mistake(f"{self.name} has no {key} → is it a whole config.json?")
        return default[0] if value is None else value

    def count(self, key: str, *default: int) -> int:
        """An integer above 0."""
        value = self.get(key, *default)
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value < LARGEST
        return self._checked(key, value, fits, "a count")

    def number(self, key: str, *default: float) -> float:
        """A finite number above 0."""
        value = self.get(key, *default)
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < LARGEST and math.isfinite(value)
        return self._checked(key, value, fits, "a number above 0")

    def flag(self, key: str, *default: bool) -> bool:
        """True or False."""
        value = self.get(key, *default)
        return self._checked(key, value, isinstance(value, bool), "true or false")

    def text(self, key: str, *default: str) -> str:
        """A string."""
        value = self.get(key, *default)
        return self._checked(key, value, isinstance(value, str), "text")

    def table(self, key: str) -> "ConfigReader":
        """A nested table; an empty one if it is missing."""
        value = self.get(key, {})
        return ConfigReader(self._checked(key, value, isinstance(value, Mapping), "a table"), f"{self.name}'s {key}")

    def _checked(self, key: str, value: Any, fits: bool, what: str) -> Any:
        if not fits:
            raise Mistake(f"{self.name} has {key} = {value!r:.60}, which is not {what} → is it a whole config.json?")
        return value


def settings(hf_config: Any) -> GPT:
    """Our settings of a transformers configuration, which is an object or the dict of a config.json.

    What GPT cannot express is a Mistake that names it. Ignored are dropout, `initializer_range`, special token ids, and settings
    for generation only.
    """
    config = ConfigReader(hf_config)
    family = config.text("model_type")
    if family not in READERS:
        raise Mistake(f"model_type = {family!r:.60} is not a family we can read → use {', '.join(READERS)}")
    if config.get("quantization_config", None):
        raise Mistake("quantization_config is set: the weights are packed → take the model in float32, float16 or bfloat16")
    values = READERS[family](config) | dict(vocab_size=config.count("vocab_size"), init="gpt2", qk_norm=False, **NO_DROPOUT)
    try:
        return GPT(**values)
    except ValidationError as error:  # each value alone is valid, so this is usually a sentence of GPT's own validator
        first = error.errors(include_url=False)[0]
        other = f"model.{first['loc'][-1]} = {first['input']!r:.60}: {first['msg']} → is it a whole config.json?" if first["loc"] else ""
        raise Mistake(other or str(first["ctx"]["error"])) from None


def _gpt2(config: ConfigReader) -> dict[str, Any]:
    for key, value in {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}.items():
        _require(key, config.get(key, value), value)
    width, heads = config.count("n_embd"), config.count("n_head")
    return dict(
        num_layers=config.count("n_layer"), hidden_size=width, num_heads=heads, num_kv_heads=heads,
        ffn_size=config.count("n_inner", 4 * width), seq_length=config.count("n_positions"), norm="layernorm",
        norm_eps=config.number("layer_norm_epsilon"), position="learned", mlp=_mlp("activation_function", config, PLAIN_MLPS),
        residual="pre_norm", bias=True, qkv_bias=True, tied=config.flag("tie_word_embeddings", True),
    )  # fmt: skip


def _neox(config: ConfigReader) -> dict[str, Any]:
    _require("attention_bias", config.get("attention_bias", True), True)  # False takes the biases from attention, not from the MLP
    width, heads = config.count("hidden_size"), config.count("num_attention_heads")
    rotary = _rotary(config, config.number("rotary_pct", 0.25))
    fraction = rotary["rotary_fraction"]
    turned = int(width // heads * fraction)
    if turned % 2:
        raise Mistake(f"partial_rotary_factor = {fraction} turns {turned} features of a head, an odd number → only pairs turn here")
    return dict(
        num_layers=config.count("num_hidden_layers"), hidden_size=width, num_heads=heads, num_kv_heads=heads,
        ffn_size=config.count("intermediate_size"), seq_length=config.count("max_position_embeddings"),
        norm="layernorm", norm_eps=config.number("layer_norm_eps"), **rotary,
        mlp=_mlp("hidden_act", config, PLAIN_MLPS), residual="parallel" if config.flag("use_parallel_residual", True) else "pre_norm",
        bias=True, qkv_bias=True, tied=config.flag("tie_word_embeddings", False),
    )  # fmt: skip


def _llama(config: ConfigReader) -> dict[str, Any]:
    width, heads, bias = config.count("hidden_size"), config.count("num_attention_heads"), config.flag("attention_bias", False)
    _require("head_dim", config.get("head_dim", width // heads), width // heads)
    _require("mlp_bias", config.get("mlp_bias", False), bias)  # attention_bias is of q, k, v *and* the output: the MLP must be like it
    rotary = _rotary(config, 1.0)
    _require("partial_rotary_factor", rotary["rotary_fraction"], 1.0)
    return dict(
        num_layers=config.count("num_hidden_layers"), hidden_size=width, num_heads=heads,
        num_kv_heads=config.count("num_key_value_heads", heads), ffn_size=config.count("intermediate_size"),
        seq_length=config.count("max_position_embeddings"), norm="rmsnorm", norm_eps=config.number("rms_norm_eps"), **rotary,
        mlp=_mlp("hidden_act", config, GATED_MLPS), residual="pre_norm", bias=bias, qkv_bias=bias,
        tied=config.flag("tie_word_embeddings", False),
    )  # fmt: skip


READERS: dict[str, Callable[[ConfigReader], dict[str, Any]]] = {"gpt2": _gpt2, "gpt_neox": _neox, "llama": _llama}
"""transformers' `model_type` -> the function that reads its configuration."""


def _rotary(config: ConfigReader, fraction: float) -> dict[str, Any]:
    """All rotary settings, from the one table of transformers 5 or the single settings of earlier files."""
    table = config.table("rope_parameters" if config.get("rope_parameters", None) else "rope_scaling")
    scaling = table.text("rope_type", table.text("type", "default"))
    if scaling not in SCALINGS:
        raise Mistake(f"rope_type = {scaling!r:.60} has no counterpart here → only {', '.join(SCALINGS)} can be read")
    if unknown := sorted(map(str, set(table.config) - ROPE)):
        raise Mistake(f"{table.name} has {unknown[0]!r:.60}, which has no counterpart here → only {', '.join(sorted(ROPE))} can be read")
    rotary: dict[str, Any] = dict(
        position="rotary",
        rotary_fraction=table.number("partial_rotary_factor", config.number("partial_rotary_factor", fraction)),
        rotary_base=table.number("rope_theta", config.number("rope_theta", config.number("rotary_emb_base", 10_000.0))),
        rotary_scaling=SCALINGS[scaling],
    )
    if scaling == "linear":
        rotary |= dict(rotary_factor=table.number("factor"))
    if scaling == "llama3":
        length = table.count("original_max_position_embeddings", config.count("max_position_embeddings"))
        low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
        rotary |= dict(rotary_factor=table.number("factor"), rotary_low_factor=low, rotary_high_factor=high, rotary_original_length=length)
    return rotary


def _require(key: str, value: Any, only: Any) -> None:
    if value != only:
        raise Mistake(f"{key} = {value!r:.60} has no counterpart here → only {only!r} can be read")


def _mlp(key: str, config: ConfigReader, names: dict[str, str]) -> str:
    name = config.text(key)
    if name not in names:
        raise Mistake(f"{key} = {name!r:.60} has no counterpart here → only {', '.join(names)} can be read")
    return names[name]
