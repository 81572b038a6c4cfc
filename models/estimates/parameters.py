"""Parameter counts of a GPT in closed form: exact integers computed from its settings alone. Imports no torch.

A class of a variant.py may have any number of parameters, so a model that names one has no closed form: None.
"""

import math
from dataclasses import dataclass

from models.config import GPT
from models.estimates.communication import has_closed_form, norm_parameters

GATED = ("swiglu", "geglu")
"""The MLPs with a gate projection beside up."""


@dataclass(frozen=True)
class ParameterCount:
    """The number of parameters that are cut over tensor ranks, and of those that every tensor rank holds whole."""

    sliced: int
    replicated: int

    def __add__(self, other: "ParameterCount") -> "ParameterCount":
        return ParameterCount(self.sliced + other.sliced, self.replicated + other.replicated)

    def __mul__(self, times: int) -> "ParameterCount":
        return ParameterCount(self.sliced * times, self.replicated * times)


def parameters(model: GPT) -> int | None:
    """Unique parameters: a tied head counts once, padding of the vocabulary not at all."""
    count = _model(model, model.vocab_size)
    return None if count is None else count.sliced + count.replicated


def parameters_on_rank(model: GPT, tensor: int) -> int | None:
    """What each of `tensor` tensor ranks holds of the whole model (pipe = 1), padded vocabulary rows included."""
    count = _model(model, tensor * math.ceil(model.vocab_size / tensor))
    return None if count is None else count.sliced // tensor + count.replicated


def _model(model: GPT, vocab_rows: int) -> ParameterCount | None:
    if not has_closed_form(model):
        return None
    tables = 1 if model.tied else 2
    positions = model.seq_length * model.hidden_size if model.position == "learned" else 0
    final_norm = 0 if model.residual == "post_norm" else norm(model, model.hidden_size)  # a post-norm block ends with its own
    blocks = ParameterCount(0, 2 * norm(model, model.hidden_size)) + attention(model) + mlp(model)
    return ParameterCount(tables * vocab_rows * model.hidden_size, positions + final_norm) + blocks * model.num_layers


def norm(model: GPT, size: int) -> int:
    """A weight, and a bias for a layernorm of a model with biases."""
    return size * norm_parameters(model)


def attention(model: GPT) -> ParameterCount:
    """qkv: h (h + 2 kv); output: h². Sliced by heads. The bias of the output and the norms of one head are held whole."""
    h, qkv_rows = model.hidden_size, model.hidden_size + 2 * model.num_kv_heads * model.head_size
    head_norms = 2 * norm(model, model.head_size) if model.qk_norm else 0
    return ParameterCount(qkv_rows * (h + model.qkv_bias) + h * h, h * model.bias + head_norms)


def mlp(model: GPT) -> ParameterCount:
    """up (and gate): h f each; down: f h. Sliced over f. The bias of down is held whole."""
    h, f = model.hidden_size, model.ffn_size
    up_rows = f * (2 if model.mlp in GATED else 1)
    return ParameterCount(up_rows * (h + model.bias) + f * h, h * model.bias)
