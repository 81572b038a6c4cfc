"""How many parameters a GPT has, in closed form: exact integers from its settings alone. No torch.

A variant's own class may hold anything, so a model that names one has no closed form: None.
"""

import math
from dataclasses import dataclass

from models.config import CHOICES, GPT, VARIANT

GATED = ("swiglu", "geglu")


@dataclass(frozen=True)
class Count:
    """Parameters that tensor ranks share out, and those that each of them holds whole."""

    sliced: int
    replicated: int

    def __add__(self, other: "Count") -> "Count":
        return Count(self.sliced + other.sliced, self.replicated + other.replicated)

    def __mul__(self, times: int) -> "Count":
        return Count(self.sliced * times, self.replicated * times)


def parameters(model: GPT) -> int | None:
    """Unique parameters: a tied head counts once, padding of the vocabulary not at all."""
    count = _model(model, model.vocab_size)
    return None if count is None else count.sliced + count.replicated


def parameters_on_rank(model: GPT, tensor: int) -> int | None:
    """What each of `tensor` tensor ranks holds of the whole model (pipe = 1), padded vocabulary rows included."""
    count = _model(model, tensor * math.ceil(model.vocab_size / tensor))
    return None if count is None else count.sliced // tensor + count.replicated


def _model(model: GPT, vocab_rows: int) -> Count | None:
    if any(getattr(model, setting).startswith(VARIANT) for setting in CHOICES):
        return None
    tables = 1 if model.tied else 2
    positions = model.seq_length * model.hidden_size if model.position == "learned" else 0
    final_norm = 0 if model.residual == "post_norm" else norm(model, model.hidden_size)  # a post-norm block ends in its own
    return Count(tables * vocab_rows * model.hidden_size, positions + final_norm) + block(model) * model.num_layers


def block(model: GPT) -> Count:
    """Two norms, attention, MLP."""
    return Count(0, 2 * norm(model, model.hidden_size)) + attention(model) + mlp(model)


def norm(model: GPT, size: int) -> int:
    """A weight, and a bias where a layernorm has one."""
    return size * (2 if model.norm == "layernorm" and model.bias else 1)


def attention(model: GPT) -> Count:
    """qkv: h (h + 2 kv); output: h². Sliced by heads; the output's bias and the norms of one head are held whole."""
    h, qkv_rows = model.hidden_size, model.hidden_size + 2 * model.num_kv_heads * model.head_size
    head_norms = 2 * norm(model, model.head_size) if model.qk_norm else 0
    return Count(qkv_rows * (h + model.qkv_bias) + h * h, h * model.bias + head_norms)


def mlp(model: GPT) -> Count:
    """up (and gate): h f each; down: f h. Sliced over f; the bias of down is held whole."""
    h, f = model.hidden_size, model.ffn_size
    up_rows = f * (2 if model.mlp in GATED else 1)
    return Count(up_rows * (h + model.bias) + f * h, h * model.bias)
