"""Sliding-window attention: a token attends to itself and to a few tokens before it (arXiv:2004.05150, section 3.1)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention import Attention, Core

WINDOW = 32
"""Tokens that a token attends to, itself included."""


class SlidingWindowCore(Core):
    """softmax(q kᵀ/√e + bias) v over the keys j of a query i with 0 ≤ i − j < WINDOW."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, samples: Tensor | None) -> Tensor:
        """q 'b h s e', k and v 'b k s e', bias 'h s s' or None -> 'b h s e'."""
        places = torch.arange(q.shape[2], device=q.device)
        distance = places[:, None] - places  # s s
        inside = (distance >= 0) & (distance < WINDOW)
        mask = inside if bias is None else bias.masked_fill(~inside, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


class SlidingWindowAttention(Attention):
    """Attention whose heads look no further back than WINDOW tokens. Has no attention dropout."""

    core_class = SlidingWindowCore
