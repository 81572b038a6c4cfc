"""Causal self-attention with its heads shared out over tensor ranks."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from models.dropout import dropped, mixed
from models.position import Position
from models.recompute import recomputed
from models.registry import BuildContext
from models.seed import seed_of
from parallel.collectives import gather_shared
from parallel.grid import Grid
from parallel.linear import ColumnParallelLinear, RowParallelLinear, refuse_uneven


class Core(nn.Module):
    """softmax(q kᵀ/√e + bias) v by torch's fused kernel, which keeps no s × s matrix."""

    def __init__(self, name: str, p: float, seed: int, grid: Grid) -> None:
        super().__init__()
        self.p, self.key, self.tensor_rank = p, seed_of(seed, f"{name}.dropout"), grid.tensor_rank

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, samples: Tensor | None) -> Tensor:
        """q 'b h s e', k and v 'b k s e', bias 'h s s' or None (causal) -> 'b h s e'."""
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=grouped)


class DroppingCore(Core):
    """softmax(…) · mask/(1 − p) · v with the probabilities written out: b·h·s² memory.

    The mask is a hash of (seed, layer, sample, query position, global head, key position): equal on every layout.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, samples: Tensor | None) -> Tensor:
        """As Core's."""
        if not self.training:
            return super().forward(q, k, v, bias, samples)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        length = q.shape[2]
        causal = torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu(1) if bias is None else bias
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + causal
        probabilities = scores.float().softmax(-1).to(q.dtype) if q.dtype.itemsize < 4 else scores.softmax(-1)
        return probabilities.masked_fill(self.mask(samples, q.shape[1], length), 0.0) * (1 / (1 - self.p)) @ v

    def mask(self, samples: Tensor | None, heads: int, length: int) -> Tensor:
        """'b h s s' bool, True where a probability is dropped."""
        places = mixed(self.key, samples, 0, length)  # b s
        keys = torch.arange(length, device=places.device)
        global_heads = torch.arange(heads, device=places.device) + self.tensor_rank * heads
        features = (global_heads[:, None] << 32) + keys  # h t: no head's numbers depend on the length
        return rearrange(dropped(places, features.flatten(), self.p), "b s (h t) -> b h s t", h=heads)


class Attention(nn.Module):
    """softmax(q kᵀ/√e + bias) v for this rank's heads, then the row-parallel output (arXiv:1909.08053, fig. 3b).

    x: 'b s d', equal on every tensor rank, both ways ('b s/tp d' under sequence parallelism). Rank i holds query heads
    [i·H/tp, (i+1)·H/tp) and the kv heads that serve exactly them, so nothing is communicated between qkv and output.

    With fewer kv heads K than tensor ranks, tp/K neighbours use the same kv head. Each computes its share of that head's
    features, and the head is gathered among them: no weight is replicated, so each gradient exists, and counts, once.
    """

    def __init__(self, name: str, context: BuildContext) -> None:
        super().__init__()
        model, init, grid = context.model, context.init, context.grid
        e, q_size, kv_size = model.head_size, model.hidden_size, model.num_kv_heads * model.head_size
        refuse_uneven((model.num_heads,), grid, f"{name}'s heads")  # half a head divides too, and is none
        self.head_size, self.kv_group = e, context.kv_group
        self.qkv = ColumnParallelLinear(f"{name}.qkv", model.hidden_size, (q_size, kv_size, kv_size), model.qkv_bias, init.inner, grid)
        self.output = RowParallelLinear(f"{name}.output", q_size, model.hidden_size, model.bias, init.residual, grid)
        scheme = context.chosen("position")
        self.position = (Position if scheme.at_input else scheme)(f"{name}.position", model, init, grid)
        # Inside a sliced region every tensor rank sees other heads, so the gradients of these weights are partial there.
        norm = context.chosen("norm") if model.qk_norm else nn.Identity
        self.q_norm = norm(f"{name}.q_norm", e, model, grid.tensor_group)
        self.k_norm = norm(f"{name}.k_norm", e, model, grid.tensor_group)
        core = DroppingCore if model.attention_dropout else Core
        make_core = recomputed(core) if context.recompute == "selective" else core
        self.core = make_core(name, model.attention_dropout, context.seed, grid)

    def forward(self, x: Tensor, samples: Tensor | None = None) -> Tensor:
        """'b s d' -> 'b s d'; samples: 'b', global sample indices for dropout."""
        q, k, v = self.qkv(x).split(self.qkv.parts, dim=-1)
        k, v = gather_shared(k, self.kv_group), gather_shared(v, self.kv_group)
        q, k, v = (rearrange(part, "b s (h e) -> b h s e", e=self.head_size) for part in (q, k, v))
        q, k = self.position.rotate(self.q_norm(q), self.k_norm(k))
        y = self.core(q, k, v, self.position.bias(q), samples)
        return self.output(rearrange(y, "b h s e -> b s (h e)"))
