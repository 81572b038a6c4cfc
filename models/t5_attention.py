"""The three attentions of T5: the encoder's and the decoder's to their own rows, and the decoder's to the encoder's rows.

Scores are not divided by √e; instead the initial weights of queries are (arXiv:1910.10683's code).
"""

import math
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from models.attention import Attention, DroppingCore
from models.init import GPT2Init
from models.recompute import recomputed
from models.registry import BuildContext
from models.segments import visible
from parallel.linear import ColumnParallelLinear, RowParallelLinear


class UnscaledCore(DroppingCore):
    """softmax(q kᵀ + bias) v, with dropout of the probabilities where there is any."""

    def divisor(self, q: Tensor) -> float:
        """1: scores are not divided."""
        return 1.0


class DecoderAttention(Attention):
    """Causal attention with relative positions, and the base class of the encoder's."""

    core_class = UnscaledCore

    def initial_qkv(self, init: GPT2Init, name: str, shape: tuple[int, ...]) -> Tensor:
        """The whole fused projection, the rows of q first."""
        q, kv = super().initial_qkv(init, name, shape).split([shape[0] // 3, shape[0] // 3 * 2])
        return torch.cat([q / math.sqrt(self.head_size), kv])


class EncoderAttention(DecoderAttention):
    """Attention in both directions, among the rows with equal numbers of segments."""

    def forward(self, x: Tensor, samples: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """'b s d' -> 'b s d'; segments: 'b s', padding has a number of its own. None: all rows attend to all."""
        q, k, v = self.heads(x)
        bias = self.position.bias(q)
        assert bias is not None
        bias = bias if segments is None else bias + visible(segments, segments, q.dtype)
        return self.output(rearrange(self.core(q, k, v, bias, samples), "b h s e -> b s (h e)"))


class CrossAttention(nn.Module):
    """softmax(q kᵀ + bias) v with queries of the decoder's rows, keys and values of the encoder's. No positions.

    x: 'b t d', source: 'b s d', both equal on every tensor rank (cut along t and s under sequence parallelism), and so is the output
    'b t d'. Rank i holds heads [i·H/tp, (i+1)·H/tp).
    """

    def __init__(self, name: str, context: BuildContext) -> None:
        super().__init__()
        model, init, grid = context.model, context.init, context.grid
        self.head_size, size = model.head_size, model.num_heads * model.head_size
        self.q = ColumnParallelLinear(f"{name}.q", model.hidden_size, (size,), model.qkv_bias, partial(self.initial_q, init), grid)
        self.kv = ColumnParallelLinear(f"{name}.kv", model.hidden_size, (size, size), model.qkv_bias, init.inner, grid)
        self.output = RowParallelLinear(f"{name}.output", size, model.hidden_size, model.output_bias, init.residual, grid)
        make_core = recomputed(UnscaledCore) if context.recompute == "selective" else UnscaledCore
        self.core = make_core(name, model.attention_dropout, context.seed, grid)

    def initial_q(self, init: GPT2Init, name: str, shape: tuple[int, ...]) -> Tensor:
        """The whole projection of queries."""
        return init.inner(name, shape) / math.sqrt(self.head_size)

    def forward(self, x: Tensor, source: Tensor, bias: Tensor, samples: Tensor | None = None) -> Tensor:
        """'b t d', 'b s d', bias 'b 1 t s' -> 'b t d'; samples: 'b', the global sample indices that dropout masks are computed from."""
        return self.output(rearrange(self.core(self.queries(x), *self.keys_and_values(source), bias, samples), "b h t e -> b t (h e)"))

    def queries(self, x: Tensor) -> Tensor:
        """'b t d' -> 'b h t e' of this rank's heads."""
        return rearrange(self.q(x), "b t (h e) -> b h t e", e=self.head_size)

    def keys_and_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """'b s d' -> k and v 'b h s e' of this rank's heads."""
        k, v = rearrange(self.kv(source), "b s (two h e) -> two b h s e", two=2, e=self.head_size)
        return k, v


def visible_sources(targets: Tensor, sources: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of cross attention, 'b 1 t s': 0 where a source has the target's number, very low elsewhere.

    targets 'b t' and sources 'b s' are numbers of segments. Not −∞: the padding of a target may see no source, and its output would be
    NaN. Half of the lowest number, so that adding a score does not give −∞ either.
    """
    return visible(targets, sources, dtype).clamp_(min=torch.finfo(dtype).min / 2)
