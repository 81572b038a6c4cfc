"""Causal self-attention with its heads shared out over tensor ranks."""

from typing import TYPE_CHECKING

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.linear import ColumnParallelLinear, RowParallelLinear, refuse_uneven

if TYPE_CHECKING:
    from models.parts import Parts


class Attention(nn.Module):
    """softmax(q kᵀ/√e + bias) v for this rank's heads, then the row-parallel output (arXiv:1909.08053, fig. 3b).

    x: 'b s d', equal on every tensor rank, both ways. Rank i holds query heads [i·H/tp, (i+1)·H/tp) and the kv heads that
    serve exactly them, so nothing is communicated between qkv and output.
    """

    def __init__(self, name: str, parts: "Parts") -> None:
        super().__init__()
        model, init, grid = parts.model, parts.init, parts.grid
        refuse_uneven((model.num_heads, model.num_kv_heads), grid, f"{name}'s heads")  # even features could still cut a head in two
        e, q_size, kv_size = model.head_size, model.hidden_size, model.num_kv_heads * model.head_size
        self.head_size, self.grouped = e, model.num_kv_heads != model.num_heads
        self.qkv = ColumnParallelLinear(f"{name}.qkv", model.hidden_size, (q_size, kv_size, kv_size), model.qkv_bias, init.inner, grid)
        self.output = RowParallelLinear(f"{name}.output", q_size, model.hidden_size, model.bias, init.residual, grid)
        self.position = parts.position(f"{name}.position")
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if model.qk_norm:
            self.q_norm = parts.head_norm(f"{name}.q_norm")
            self.k_norm = parts.head_norm(f"{name}.k_norm")

    def forward(self, x: Tensor) -> Tensor:
        """'b s d' -> 'b s d'."""
        q, k, v = (rearrange(part, "b s (h e) -> b h s e", e=self.head_size) for part in self.qkv(x).split(self.qkv.parts, dim=-1))
        q, k = self.position.rotate(self.q_norm(q), self.k_norm(k))
        bias = self.position.bias(q)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=self.grouped)
        return self.output(rearrange(y, "b h s e -> b s (h e)"))
