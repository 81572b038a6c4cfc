"""Reads a transformers config.json of GPT-2, GPT-NeoX (Pythia), Llama, Mistral, Qwen2, Qwen3, BERT, MegatronBERT, T5 or UMT5.

Does not import transformers.

The file may come from an untrusted source: a value of the wrong type or out of range is a Mistake that names it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from models.config import GPT
from models.encoder_config import BERT, T5
from parallel.errors import Mistake

PLAIN_MLPS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu"}
GATED_MLPS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh"}
"""Their activation -> our mlp, for models without and with a gate."""
FEED_FORWARDS = {"relu": "relu", "gated-gelu": "geglu_tanh", "gated-silu": "swiglu", "gelu": "gelu", "gelu_new": "gelu_tanh"}
"""A T5's feed_forward_proj -> our mlp. Its gated-gelu is the tanh approximation."""

NO_DROPOUT = {"embedding_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0, "attention_dropout": 0.0}
"""Imported models get no dropout. Theirs belongs to a training that we do not continue."""
LARGEST = 2**40
"""Numbers must be below this. No file holds a tensor of such a size."""
MOST: dict[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "block_count"), 2**12),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "attention.head_count", "attention.head_count_kv"), 2**14),
    **dict.fromkeys(("hidden_size", "n_embd", "head_dim", "embedding_length", "attention.key_length"), 2**20),
    **dict.fromkeys(("intermediate_size", "n_inner", "feed_forward_length"), 2**23),
    "vocab_size": 2**24,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "context_length", "original_max_position_embeddings"), 2**27),
}
"""Key -> the largest count that is read, a multiple of what the largest models have (of layers 126, of positions 10 million): lists as
long as these numbers are made. In a GGUF file, the name of the architecture stands in front."""
ROPE = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings",
}  # fmt: skip
"""The keys of a table of rotary settings that are read. Others are refused."""
SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3"}
"""Their rope_type -> our rotary_scaling."""
_LLAMA = dict(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, hidden_act="silu", rms_norm_eps=1e-6, tie_word_embeddings=False
)
_BERT = dict(
    hidden_act="gelu", max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12, tie_word_embeddings=True, is_decoder=False,
    add_cross_attention=False,
)  # fmt: skip
_T5 = dict(
    d_model=512, d_kv=64, relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
    is_encoder_decoder=True, tie_word_embeddings=True,
)  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": dict(
        vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, activation_function="gelu_new", layer_norm_epsilon=1e-5,
        scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, tie_word_embeddings=True,
    ),
    "gpt_neox": dict(
        vocab_size=50432, hidden_size=6144, num_hidden_layers=44, num_attention_heads=64, intermediate_size=24576, hidden_act="gelu",
        max_position_embeddings=2048, layer_norm_eps=1e-5, tie_word_embeddings=False, use_parallel_residual=True, attention_bias=True,
    ),
    "llama": _LLAMA | dict(
        vocab_size=32000, intermediate_size=11008, max_position_embeddings=2048, attention_bias=False, mlp_bias=False
    ),
    "mistral": _LLAMA | dict(
        vocab_size=32000, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131_072, sliding_window=4096
    ),
    "qwen2": _LLAMA | dict(
        vocab_size=151_936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768, use_sliding_window=False,
        sliding_window=4096, max_window_layers=28,
    ),
    "qwen3": _LLAMA | dict(
        vocab_size=151_936, intermediate_size=22016, num_key_value_heads=32, head_dim=128, max_position_embeddings=32768,
        attention_bias=False, use_sliding_window=False, sliding_window=4096, max_window_layers=28,
    ),
    "bert": _BERT | dict(vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "megatron-bert": _BERT | dict(
        vocab_size=29056, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "umt5": _T5 | dict(vocab_size=250_112, d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj="gated-gelu"),
    "t5": _T5 | dict(vocab_size=32_128, d_ff=2048, num_layers=6, num_heads=8, feed_forward_proj="relu"),
}  # fmt: skip
"""Family -> what transformers takes for a key that config.json does not have."""
DROPOUT_KEYS = (
    *("embd_pdrop", "resid_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate"),
)
QUIET_KEYS = {
    "model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map", "quantization_config",
    "initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "n_ctx", "gradient_checkpointing",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "classifier_dropout",
    "task_specific_params", "id2label", "label2id", "num_labels", "problem_type", "return_dict", "pretraining_tp", "is_decoder",
    "reorder_and_upcast_attn", "chunk_size_feed_forward", "tokenizer_class", "use_flash_attn", "_attn_implementation",
    "layer_types", "decoder_start_token_id", "initializer_factor", "output_past", "is_gated_act", "dense_act_fn", "scalable_attention",
}  # fmt: skip
"""Keys that are about something else than what the model computes, or about its precision only."""
NULL_HAS_A_MEANING = ("num_key_value_heads", "sliding_window")
"""Keys where null is not the same as a missing key: as many kv heads as heads, and no window."""


class ConfigReader:
    """Reads single values of a configuration and checks their types. A missing value and null are the same.

    Each method takes the default as an optional second argument. Without one, a missing value is a Mistake.
    """

    def __init__(self, config: Mapping[str, Any], name: str = "the transformers configuration") -> None:
        self.config, self.name = config, name
        self.read: set[str] = set()
        """The keys that were asked for."""

    def get(self, key: str, *default: Any) -> Any:
        """The value, of any type."""
        self.read.add(key)
        value = self.config.get(key)
        if value is None and not default:
            raise Mistake(f"{self.name} has no {key} → is it a whole config.json?")
        return default[0] if value is None else value

    def count(self, key: str, *default: int) -> int:
        """An integer above 0, and no larger than any model has."""
        value = self.get(key, *default)
        most = MOST.get(key) or MOST.get(key.partition(".")[2], LARGEST - 1)
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most
        return self._checked(key, value, fits, f"a count up to {most:,}")

    def token(self, key: str, *default: int) -> int:
        """The id of a token."""
        value, size = self.get(key, *default), self.count("vocab_size")
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < size
        return self._checked(key, value, fits, f"an id below vocab_size = {size}")

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


def settings(hf_config: Any) -> GPT | BERT | T5:
    """Our settings of a transformers configuration, which is an object or the dict of a config.json.

    What no model of ours can express is a Mistake that names it. `unread_keys` lists the keys that are ignored.
    """
    return _read(hf_config if isinstance(hf_config, Mapping) else hf_config.to_dict())[0]


def without_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without keys that are null where a missing key is meant: transformers has a default for these."""
    defaults = DEFAULTS.get(str(config.get("model_type")), {}).keys() - {*NULL_HAS_A_MEANING}
    return {key: value for key, value in config.items() if value is not None or key not in defaults}


def unread_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys of a config.json that are set and not read, but for those that tell nothing about what the model computes."""
    quiet = {*QUIET_KEYS, *DROPOUT_KEYS, *_read(config)[1].read}
    return [key for key, value in config.items() if value not in (None, False, [], {}) and key not in quiet]


def _read(whole: Mapping[str, Any]) -> tuple[GPT | BERT | T5, ConfigReader]:
    """(the settings, the reader, which knows what was read)"""
    config = ConfigReader(whole)
    family = config.text("model_type")
    if family not in READERS:
        raise Mistake(f"model_type = {family!r:.60} is not a family we can read → use {', '.join(READERS)}")
    if config.get("quantization_config", None):
        raise Mistake("quantization_config is set: the weights are packed → take the model in float32, float16 or bfloat16")
    config = ConfigReader(DEFAULTS[family] | without_nulls(whole))
    values = READERS[family](config) | dict(vocab_size=config.count("vocab_size"), init="gpt2", **NO_DROPOUT)
    try:
        if family in T5S:
            return T5(**values), config
        return (BERT(**values) if family in BERTS else GPT(**{"qk_norm": False, **values})), config
    except ValidationError as error:  # each value alone is valid, so this is usually a sentence of the model's own validator
        first = error.errors(include_url=False)[0]
        other = f"model.{first['loc'][-1]} = {first['input']!r:.60}: {first['msg']} → is it a whole config.json?" if first["loc"] else ""
        raise Mistake(other or str(first["ctx"]["error"])) from None


def _gpt2(config: ConfigReader) -> dict[str, Any]:
    for key in ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        _require(key, config.get(key), DEFAULTS["gpt2"][key])
    width, heads = config.count("n_embd"), config.count("n_head")
    return dict(
        num_layers=config.count("n_layer"), hidden_size=width, num_heads=heads, num_kv_heads=heads,
        ffn_size=config.count("n_inner", 4 * width), seq_length=config.count("n_positions"), norm="layernorm",
        norm_eps=config.number("layer_norm_epsilon"), position="learned", mlp=_mlp("activation_function", config, PLAIN_MLPS),
        residual="pre_norm", bias=True, qkv_bias=True, tied=config.flag("tie_word_embeddings"),
    )  # fmt: skip


def _neox(config: ConfigReader) -> dict[str, Any]:
    width, heads = config.count("hidden_size"), config.count("num_attention_heads")
    attention_bias = config.flag("attention_bias")  # of q, k, v and the output; the MLP and the norms always have biases
    table = _rotary_table(config)
    fraction = table.number("partial_rotary_factor", config.number("rotary_pct", 0.25))
    turned = int(width // heads * fraction)
    if turned % 2:
        raise Mistake(f"partial_rotary_factor = {fraction} turns {turned} features of a head, an odd number → only pairs turn here")
    return dict(
        num_layers=config.count("num_hidden_layers"), hidden_size=width, num_heads=heads, num_kv_heads=heads,
        ffn_size=config.count("intermediate_size"), seq_length=config.count("max_position_embeddings"),
        norm="layernorm", norm_eps=config.number("layer_norm_eps"), **_rotary(config, table, "rotary_emb_base"), rotary_fraction=fraction,
        mlp=_mlp("hidden_act", config, PLAIN_MLPS), residual="parallel" if config.flag("use_parallel_residual") else "pre_norm",
        bias=True, qkv_bias=attention_bias, output_bias=attention_bias, tied=config.flag("tie_word_embeddings"),
    )  # fmt: skip


def _llama(config: ConfigReader) -> dict[str, Any]:
    attention_bias = config.flag("attention_bias")  # of q, k, v and the output
    return _llama_like(config) | dict(bias=config.flag("mlp_bias"), qkv_bias=attention_bias, output_bias=attention_bias)


def _mistral(config: ConfigReader) -> dict[str, Any]:
    _refuse_window(config)
    return _llama_like(config) | dict(bias=False, qkv_bias=False)


def _qwen2(config: ConfigReader) -> dict[str, Any]:
    _refuse_window_of_qwen(config)
    return _llama_like(config) | dict(bias=False, qkv_bias=True)


def _qwen3(config: ConfigReader) -> dict[str, Any]:
    _refuse_window_of_qwen(config)
    attention_bias = config.flag("attention_bias")
    return _llama_like(config) | dict(bias=False, qkv_bias=attention_bias, output_bias=attention_bias, qk_norm=True)


def _bert(config: ConfigReader) -> dict[str, Any]:
    for key in ("hidden_act", "tie_word_embeddings", "is_decoder", "add_cross_attention"):
        _require(key, config.get(key), _BERT[key])
    _require("position_embedding_type", config.get("position_embedding_type", "absolute"), "absolute")  # a key of transformers 4
    names = config.get("architectures", [])
    return dict(
        num_layers=config.count("num_hidden_layers"), hidden_size=config.count("hidden_size"),
        num_heads=config.count("num_attention_heads"), ffn_size=config.count("intermediate_size"),
        seq_length=config.count("max_position_embeddings"), token_types=config.count("type_vocab_size"),
        norm_eps=config.number("layer_norm_eps"), mlp="gelu", residual="post_norm" if config.text("model_type") == "bert" else "pre_norm",
        sentence_head=any(str(name).endswith("ForPreTraining") for name in names) if isinstance(names, list) else False,
    )  # fmt: skip


def _t5(config: ConfigReader) -> dict[str, Any]:
    """An untied head of a T5 is not scaled, as in T5 1.1. T5 has no longest text; n_positions is what it was trained with.

    transformers 5 writes of every model that it is tied, and of a T5 1.1 that its decoder's output is not scaled. A target begins with
    the token 0, as T5's did, where nothing is said.
    """
    _require("is_encoder_decoder", config.get("is_encoder_decoder"), True)
    width, heads, head_size = config.count("d_model"), config.count("num_heads"), config.count("d_kv")
    layers, length = config.count("num_layers"), config.count("n_positions", 512)
    return dict(
        num_encoder_layers=layers, num_layers=config.count("num_decoder_layers", layers), hidden_size=width, num_heads=heads,
        head_size=None if head_size * heads == width else head_size, ffn_size=config.count("d_ff"), source_length=length,
        seq_length=length, relative_buckets=config.count("relative_attention_num_buckets"),
        relative_distance=config.count("relative_attention_max_distance"), norm_eps=config.number("layer_norm_epsilon"),
        mlp=_mlp("feed_forward_proj", config, FEED_FORWARDS), start_token=config.token("decoder_start_token_id", 0),
        tied=config.flag("tie_word_embeddings") and config.flag("scale_decoder_outputs", True),
    )  # fmt: skip


READERS: dict[str, Callable[[ConfigReader], dict[str, Any]]] = {
    "gpt2": _gpt2, "gpt_neox": _neox, "llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3,
    "bert": _bert, "megatron-bert": _bert, "umt5": _t5, "t5": _t5,
}  # fmt: skip
"""transformers' `model_type` -> the function that reads its configuration."""
BERTS = ("bert", "megatron-bert")
"""Those of them whose models are a BERT."""
T5S = ("umt5", "t5")
"""Those whose models are a T5. The others are a GPT."""


def _llama_like(config: ConfigReader) -> dict[str, Any]:
    """The settings that Llama, Mistral, Qwen2 and Qwen3 have in common: all but biases and the norms of q and k."""
    width, heads, table = config.count("hidden_size"), config.count("num_attention_heads"), _rotary_table(config)
    if table.text("rope_type", table.text("type", "default")) != "default":  # else transformers does not read it in these families
        partial = table.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
        _require("partial_rotary_factor", partial, 1.0)
    head_size = config.count("head_dim", width // heads or 1)
    return dict(
        num_layers=config.count("num_hidden_layers"), hidden_size=width, num_heads=heads,
        num_kv_heads=config.count("num_key_value_heads", heads), head_size=None if head_size * heads == width else head_size,
        ffn_size=config.count("intermediate_size"), seq_length=config.count("max_position_embeddings"), norm="rmsnorm",
        norm_eps=config.number("rms_norm_eps"), **_rotary(config, table, "rope_theta"), rotary_fraction=1.0,
        mlp=_mlp("hidden_act", config, GATED_MLPS), residual="pre_norm", tied=config.flag("tie_word_embeddings"),
    )  # fmt: skip


def _refuse_window(config: ConfigReader) -> None:
    """A Mistake if a sliding window hides tokens. One that is no shorter than the longest text hides none."""
    window, length = config.count("sliding_window", LARGEST - 1), config.count("max_position_embeddings")
    if window < length:
        raise Mistake(
            f"sliding_window = {window} is shorter than max_position_embeddings = {length}: attention within a window has no counterpart "
            f"here → set max_position_embeddings to {window} in config.json, for texts from which the window hides nothing"
        )


def _refuse_window_of_qwen(config: ConfigReader) -> None:
    """The same, where a window counts only if use_sliding_window is set, and only in some layers."""
    layers, first = config.count("num_hidden_layers"), config.get("max_window_layers")
    kinds = config.get("layer_types", None)
    slides = "sliding_attention" in kinds if isinstance(kinds, (list, tuple)) else not isinstance(first, int) or first < layers
    if config.flag("use_sliding_window") and slides:
        _refuse_window(config)


def _rotary_table(config: ConfigReader) -> ConfigReader:
    """The table of rotary settings. If a file has both names for it, transformers reads the older one."""
    return config.table("rope_scaling" if config.get("rope_scaling", None) else "rope_parameters")


def _rotary(config: ConfigReader, table: ConfigReader, base: str) -> dict[str, Any]:
    """All rotary settings but the fraction, from the table or from single settings. `base`: the key of the family's base beside it."""
    scaling = table.text("rope_type", table.text("type", "default"))
    if scaling not in SCALINGS:
        raise Mistake(f"rope_type = {scaling!r:.60} has no counterpart here → only {', '.join(SCALINGS)} can be read")
    if unknown := sorted(str(key) for key, value in table.config.items() if key not in ROPE and value is not None):
        raise Mistake(f"{table.name} has {unknown[0]!r:.60}, which has no counterpart here → only {', '.join(sorted(ROPE))} can be read")
    rotary: dict[str, Any] = dict(
        position="rotary", rotary_base=table.number("rope_theta", config.number(base, 10_000.0)), rotary_scaling=SCALINGS[scaling]
    )
    if scaling == "linear":
        rotary |= dict(rotary_factor=table.number("factor"))
    if scaling == "llama3":
        beside = config if config.get("original_max_position_embeddings", None) else table  # what stands beside the table goes first
        length = beside.count("original_max_position_embeddings", config.count("max_position_embeddings"))
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
