"""Self-attention, causal or in both directions (multi-head, grouped-query, multi-query), with its heads distributed over tensor ranks."""

import math
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from models.dropout import dropped, mixed
from models.init import GPT2Init
from models.position import Position
from models.recompute import recomputed
from models.registry import BuildContext
from models.seed import seed_of
from models.segments import confined, takes_varlen, varlen_attention, visible
from models.token_positions import TokenPositions
from parallel.collectives import gather_shared
from parallel.grid import Grid
from parallel.linear import ColumnParallelLinear, RowParallelLinear, refuse_uneven
from parallel.region import region_of


class Core(nn.Module):
    """softmax(q kᵀ/√e + bias) v by torch's fused kernel, which stores no s × s matrix."""

    def __init__(self, name: str, p: float, seed: int, grid: Grid) -> None:
        super().__init__()
        self.p, self.key, self.tensor_rank = p, seed_of(seed, f"{name}.dropout"), grid.tensor_rank
        self.places = TokenPositions(region_of(grid))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, samples: Tensor | None) -> Tensor:
        """q 'b h s e', k and v 'b k s e', bias 'h s s' or 'b h s s' or None (causal) -> 'b h s e'."""
        if q.shape[1] != k.shape[1] and needs_repeated_heads(q.dtype, q.device):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        settings = {"is_causal": bias is None, "enable_gqa": q.shape[1] != k.shape[1], "scale": 1 / self.divisor(q)}
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **settings)

    def divisor(self, q: Tensor) -> float:
        """What the scores q kᵀ are divided by: √e."""
        return math.sqrt(q.shape[-1])


def needs_repeated_heads(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kv heads must be repeated for the query heads that share them, or no fused kernel takes them.

    On a GPU only the flash kernel takes shared kv heads, and it has no fp32. Without it torch would store b·h·s² probabilities.
    """
    return device.type == "cuda" and dtype == torch.float32


class DroppingCore(Core):
    """Core with dropout of the probabilities: softmax(…) · mask/(1 − p) · v. The probabilities are stored: b·h·s² memory.

    The mask is a hash of (seed, layer, sample, query position, global head, key position), so it does not depend on the layout.
    In evaluation nothing is dropped, and the fused kernel is used.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, samples: Tensor | None) -> Tensor:
        if not (self.training and self.p):
            return super().forward(q, k, v, bias, samples)

        # The fused kernel's computation written out.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        length = q.shape[2]
        causal = torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu(1) if bias is None else bias
        scores = q @ k.transpose(-1, -2) / self.divisor(q) + causal
        probabilities = scores.float().softmax(-1).to(q.dtype) if q.dtype.itemsize < 4 else scores.softmax(-1)
        return probabilities.masked_fill(self.mask(samples, q, k), 0.0) * (1 / (1 - self.p)) @ v

    def mask(self, samples: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
        """'b h s t' bool, True where a probability of this rank's queries 'b h s e' for the keys 'b h t e' is dropped."""
        heads, queries = q.shape[1], mixed(self.key, samples, self.places.of(q))  # b s
        global_heads = torch.arange(heads, device=q.device) + self.tensor_rank * heads
        features = (global_heads[:, None] << 32) + self.places.of(k)  # h t; a head's numbers do not depend on the length
        return rearrange(dropped(queries, features.flatten(), self.p), "b s (h t) -> b h s t", h=heads)


class Attention(nn.Module):
    """softmax(q kᵀ/√e + bias) v for this rank's heads, then the row-parallel output projection (arXiv:1909.08053, fig. 3b).

    x: 'b s d', equal on every tensor rank, and so is the output ('b s/tp d' each under sequence parallelism). With H query heads,
    rank i holds query heads [i·H/tp, (i+1)·H/tp) and exactly the kv heads that they use, so nothing is communicated between the
    qkv projection and the output projection.

    With fewer kv heads K than tensor ranks, tp/K neighbouring ranks use the same kv head. Each of them computes K/tp of the
    head's features, and the head is gathered among them. No weight is replicated, so every gradient exists, and counts, once.

    A subclass in an experiment's variant.py may name a `core_class` of its own, or define `forward`.
    """

    core_class = Core
    """What computes the heads' outputs from q, k and v. A subclass's own class gets the probability of attention dropout as `p`."""

    def __init__(self, name: str, context: BuildContext) -> None:
        super().__init__()
        model, init, grid = context.model, context.init, context.grid
        e, q_size, kv_size = model.head_size, model.num_heads * model.head_size, model.num_kv_heads * model.head_size
        refuse_uneven((model.num_heads,), grid, f"{name}'s heads")  # a size that is divisible could still cut through a head
        self.head_size, self.kv_group = e, context.kv_group
        parts, draw = (q_size, kv_size, kv_size), partial(self.initial_qkv, init)
        self.qkv = ColumnParallelLinear(f"{name}.qkv", model.hidden_size, parts, model.qkv_bias, draw, grid)
        self.output = RowParallelLinear(f"{name}.output", q_size, model.hidden_size, model.output_bias, init.residual, grid)

        # A position scheme of the input is a layer of its own; inside attention there is then none.
        scheme = context.chosen("position")
        self.position = (Position if scheme.at_input else scheme)(f"{name}.position", model, init, grid)

        # Every tensor rank normalises different heads, so the gradients of these weights are partial sums on each.
        norm = context.chosen("norm") if model.qk_norm else nn.Identity
        self.q_norm = norm(f"{name}.q_norm", e, model, grid.tensor_group)
        self.k_norm = norm(f"{name}.k_norm", e, model, grid.tensor_group)

        core = DroppingCore if model.attention_dropout and self.core_class is Core else self.core_class
        make_core = recomputed(core) if context.recompute == "selective" else core
        self.core = make_core(name, model.attention_dropout, context.seed, grid)

    def forward(self, x: Tensor, samples: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """'b s d' -> 'b s d'; samples: 'b', the global sample indices that dropout masks are computed from.

        segments: 'b s', the numbers of the documents in each row, to which attention is then confined (models/segments.py).
        """
        q, k, v = self.heads(x)
        with self.position.at(segments):
            q, k = self.position.rotate(self.q_norm(q), self.k_norm(k))
            bias = self.position.bias(q)
        if segments is not None and bias is None and type(self.core) is Core and takes_varlen(q):
            y = varlen_attention(q, k, v, segments)
        else:
            bias = bias if segments is None else confined(segments, bias, q.dtype)
            y = self.core(q, k, v, bias, samples)
        return self.output(rearrange(y, "b h s e -> b s (h e)"))

    def initial_qkv(self, init: GPT2Init, name: str, shape: tuple[int, ...]) -> Tensor:
        """The whole fused projection, the rows of q first."""
        return init.inner(name, shape)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x 'b s d' -> q 'b h s e', k and v 'b k s e' of this rank's heads."""
        q, k, v = self.qkv(x).split(self.qkv.parts, dim=-1)
        k, v = gather_shared(k, self.kv_group), gather_shared(v, self.kv_group)
        q, k, v = (rearrange(part, "b s (h e) -> b h s e", e=self.head_size) for part in (q, k, v))
        return q, k, v


class BidirectionalAttention(Attention):
    """Attention in which every place sees those behind it as well: BERT's, and an encoder's (arXiv:1810.04805). Sliced like `Attention`."""

    def forward(self, x: Tensor, samples: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """'b s d' -> 'b s d'. With segments 'b s', a place sees the places of its own number; padding has a number of its own."""
        q, k, v = self.heads(x)
        length = q.shape[2]
        bias = q.new_zeros(length, length) if segments is None else visible(segments, segments, q.dtype)  # s t, or b 1 s t
        return self.output(rearrange(self.core(q, k, v, bias, samples), "b h s e -> b s (h e)"))


ATTENTIONS = {"softmax": Attention}
"""What `model.attention` of a GPT may name."""
EVERY_ATTENTION = ATTENTIONS | {"bidirectional": BidirectionalAttention}
"""The same of a model of any kind. An encoder has no choice."""
