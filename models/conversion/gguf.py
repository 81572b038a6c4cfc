"""Llama, Qwen2 and Qwen3 in llama.cpp's GGUF files: their metadata as a transformers configuration, their tensors as a family.

Reads no files. In a Llama, llama.cpp rotates neighbouring features (2i, 2i + 1) where transformers and this program rotate
(i, i + half), so the rows of its q and k are in another order. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from models.conversion.families import FAMILIES, Family, Fused, Same, qkv_rows
from models.conversion.read_config import ConfigReader
from models.encoder_config import AnyModel
from parallel.errors import Mistake

ROTARY_FACTORS = "rope_freqs.weight"
"""The tensor that the rotary frequencies are divided by. This is how a GGUF file stores Llama 3.1's scaling."""
LLAMA_3 = (1.0, 4.0, 8192)
"""low_freq_factor, high_freq_factor and original_max_position_embeddings of all models published by Meta. Their factors differ."""


class Interleaved(Fused):
    """q, k and v, where the rows of each head of q and k alternate between its first and its second half."""

    def to_ours(self, tensors: list[Tensor], model: AnyModel) -> Tensor:
        """Rows '(h half two)' of q and k -> '(h two half)'; then q, k and v are concatenated by rows."""
        q, k, v = tensors
        q, k = (rearrange(x, "(h half two) ... -> (h two half) ...", two=2, half=model.head_size // 2) for x in (q, k))
        return super().to_ours([q, k, v], model)

    def to_theirs(self, tensor: Tensor, model: AnyModel) -> list[Tensor]:
        q, k, v = super().to_theirs(tensor, model)
        q, k = (rearrange(x, "(h two half) ... -> (h half two) ...", two=2, half=model.head_size // 2) for x in (q, k))
        return [q, k, v]


def _family(architecture: str, qkv: type[Fused], more: dict[str, Same | Fused]) -> Family:
    modules: dict[str, Same | Fused] = {
        "embedding": Same("token_embd"),
        "blocks.*.attention_norm": Same("blk.*.attn_norm"),
        "blocks.*.attention.qkv": qkv(("blk.*.attn_q", "blk.*.attn_k", "blk.*.attn_v"), qkv_rows),
        "blocks.*.attention.output": Same("blk.*.attn_output"),
        "blocks.*.mlp_norm": Same("blk.*.ffn_norm"),
        "blocks.*.mlp.up": Fused(("blk.*.ffn_gate", "blk.*.ffn_up"), lambda model: [model.ffn_size] * 2),
        "blocks.*.mlp.down": Same("blk.*.ffn_down"),
        "final_norm": Same("output_norm"),
    }
    return replace(FAMILIES[architecture], name=f"GGUF {architecture}", prefix="", heads=("output",), modules=modules | more)


HEAD_NORMS: dict[str, Same | Fused] = {f"blocks.*.attention.{part}_norm": Same(f"blk.*.attn_{part}_norm") for part in "qk"}
GGUF_FAMILIES = {
    "llama": _family("llama", Interleaved, {}),
    "qwen2": _family("qwen2", Fused, {}),
    "qwen3": _family("qwen3", Fused, HEAD_NORMS),
}
"""`general.architecture` -> the names of its tensors. It expresses what transformers' family of the same name does. Mistral is llama."""


def config(metadata: Mapping[str, Any], tensors: Collection[str], factors: Tensor | None) -> dict[str, Any]:
    """The transformers configuration of a file with these metadata and names of tensors.

    `factors`: the values of the tensor ROTARY_FACTORS; None if the file has none.
    """
    fields = ConfigReader(metadata, "the GGUF file")
    if (kind := fields.text("general.architecture")) not in GGUF_FAMILIES:
        raise Mistake(f"general.architecture = {kind!r:.60} has no counterpart here → only {', '.join(GGUF_FAMILIES)} can be read")
    if fields.get(f"{kind}.expert_count", 0):
        raise Mistake(f"{kind}.expert_count is set: a mixture of experts has no counterpart here → take a model without")
    width, heads = fields.count(f"{kind}.embedding_length"), fields.count(f"{kind}.attention.head_count")
    head_size = fields.count(f"{kind}.attention.key_length", width // heads or 1)
    for key in (f"{kind}.rope.dimension_count", f"{kind}.attention.value_length"):
        if (size := fields.count(key, head_size)) != head_size:
            raise Mistake(f"{key} = {size} has no counterpart here → only {head_size} can be read")
    base, length = fields.number(f"{kind}.rope.freq_base", 10_000.0), fields.count(f"{kind}.context_length")
    if (window := fields.count(f"{kind}.attention.sliding_window", length)) < length:
        key = f"{kind}.attention.sliding_window"
        raise Mistake(f"{key} = {window} is shorter than {kind}.context_length = {length} → take a model without a window")
    return {
        "model_type": kind,
        "num_hidden_layers": fields.count(f"{kind}.block_count"),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.count(f"{kind}.attention.head_count_kv", heads),
        "head_dim": head_size,
        "intermediate_size": fields.count(f"{kind}.feed_forward_length"),
        "max_position_embeddings": length,
        "vocab_size": fields.count(f"{kind}.vocab_size", len(fields.get("tokenizer.ggml.tokens", [])) or 1),
        "rms_norm_eps": _shortest_decimal(fields.number(f"{kind}.attention.layer_norm_rms_epsilon")),
        "rope_theta": base,
        "rope_scaling": _scaling(fields, kind, factors, base, head_size),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def _shortest_decimal(value: float) -> float:
    """The shortest decimal number that is equal in fp32, in which GGUF stores numbers: 1e-05, not 9.999999747378752e-06."""
    stored = torch.tensor(value, dtype=torch.float32)
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    return next(candidate for candidate in candidates if torch.tensor(candidate, dtype=torch.float32) == stored)


def _scaling(fields: ConfigReader, kind: str, factors: Tensor | None, base: float, head_size: int) -> dict[str, Any] | None:
    """The configuration's `rope_scaling`."""
    scaling = fields.text(f"{kind}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise Mistake(f"{kind}.rope.scaling.type = {scaling!r:.60} has no counterpart here → only none and linear can be read")
    if factors is None:
        return {"rope_type": "linear", "factor": fields.number(f"{kind}.rope.scaling.factor")} if scaling == "linear" else None

    # Only the factors of Llama 3.1's scaling can be expressed.
    factor = float(factors.max()) if tuple(factors.shape) == (head_size // 2,) else None
    if factor is None or not torch.allclose(factors.double(), llama3_factors(base, head_size, factor), rtol=1e-4):
        raise Mistake(f"{ROTARY_FACTORS} are not Llama 3.1's → take the model as a Hugging Face folder: its config.json names the scaling")
    low, high, length = LLAMA_3
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


def llama3_factors(base: float, head_size: int, factor: float) -> Tensor:
    """'head_size/2' in fp64: what Llama 3.1 divides the rotary frequency of each pair by."""
    low, high, length = LLAMA_3
    frequencies = base ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    kept = ((length * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return 1 / (kept + (1 - kept) / factor)
