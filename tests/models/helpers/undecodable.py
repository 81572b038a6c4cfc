"""Classes of a variant.py that a KV cache does not decode rightly, or that cannot be decoded at all."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import Attention
from models.block import PreNormBlock
from models.norm import RMSNorm
from models.position import Learned, Position, Rotary

WINDOW = 8


class MaskedCore(nn.Module):
    """softmax(q kᵀ/√e) v for the keys at which `first` <= i − j < `last`, computed from the tokens of the pass alone."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, samples: Tensor | None) -> Tensor:
        places = torch.arange(q.shape[2], device=q.device)
        distance = places[:, None] - places
        allowed = (distance >= self.first) & (distance < self.last)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)


class WindowBlock(PreNormBlock):
    """Sliding-window attention in the core."""

    def __init__(self, name, context):
        super().__init__(name, context)
        self.attention.core = MaskedCore(0, WINDOW)


class OwnAttention(Attention):
    """Sliding-window attention without `self.core`, so that there is nothing to which a cache can be given."""

    def forward(self, x: Tensor, samples: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in self.qkv(x).split(self.qkv.parts, dim=-1))
        return self.output(MaskedCore(0, WINDOW)(*self.position.rotate(q, k), v, None, samples).transpose(1, 2).flatten(2))


class OwnAttentionBlock(PreNormBlock):
    def __init__(self, name, context):
        super().__init__(name, context)
        self.attention = OwnAttention(f"{name}.attention", context)


class WholeLength(Position):
    """Attention from a table for whole sequences: no row of it fits a single token among more than WINDOW."""

    def bias(self, q: Tensor) -> Tensor:
        if q.shape[2] == 1 and len(self.places.of_keys(q)) > WINDOW:
            raise ValueError("a table of 9 places\ndoes not fit")
        distance = self.places.of(q)[..., :, None] - self.places.of_keys(q)
        return (
            torch.zeros(distance.shape, dtype=q.dtype)
            .masked_fill(distance < 0, -torch.inf)
            .expand(*distance.shape[:-3], q.shape[1], -1, -1)
        )


class Counts(Rotary):
    """Counts tokens instead of using `self.places`: a single token is always at position 0."""

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.arange(q.shape[-2])[:, None].to(q.dtype)
        return q * angle.cos(), k * angle.cos()


class OwnTable(Learned):
    """Adds the first rows of the table instead of those at `self.places`."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[: x.shape[1]]


class LookAheadBlock(PreNormBlock):
    """A token attends to the two after it, as to all before it."""

    def __init__(self, name, context):
        super().__init__(name, context)
        self.attention.core = MaskedCore(-2, 1 << 30)


class NeedsFour(MaskedCore):
    """Causal attention that cannot read fewer than four tokens."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, samples: Tensor | None) -> Tensor:
        if q.shape[2] < 4:
            raise ValueError(f"{q.shape[2]} tokens\nare fewer than 4")
        return super().forward(q, k, v, bias, samples)


class NeedsFourBlock(PreNormBlock):
    def __init__(self, name, context):
        super().__init__(name, context)
        self.attention.core = NeedsFour(0, 1 << 30)


class LengthScaled(Position):
    """q · log(number of tokens in the sequence)."""

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q * torch.tensor(1.0 + len(self.places.of_keys(q))).log(), k


class Shifted(RMSNorm):
    """Adds the previous token, and to the first token the last one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.5 * x.roll(1, 1)) if x.dim() == 3 else super().forward(x)


class BatchMean(RMSNorm):
    """Subtracts the mean over the texts of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0) / 2)


UNCACHED = {"residual": (WindowBlock, OwnAttentionBlock), "position": (Counts, OwnTable, WholeLength)}
"""Model setting -> classes that a whole pass per token decodes, and a cache does not."""
REFUSED = {"residual": (LookAheadBlock,), "position": (LengthScaled,), "norm": (Shifted, BatchMean)}
"""Model setting -> classes that let a token's logits depend on more than the tokens before it."""
