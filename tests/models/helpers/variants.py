"""What an experiment's variant.py may hold: one class of each kind, with the imports and the constructors that users write."""

import torch
from einops import rearrange
from torch import Tensor

from models.attention import Attention
from models.block import Block
from models.init import GPT2Init
from models.mlp import MLP
from models.norm import Norm
from models.position import Position
from parallel.collectives import copy_to_tensor_ranks, gather_shared
from parallel.slices import Slice, make_parameter


class SoftSign(Norm):
    """w · x / (1 + |α x|) with one trained α, held whole by every tensor rank."""

    def __init__(self, name, size, model, partial_group=None):
        super().__init__(name, size, model, partial_group, bias=False)
        self.alpha = make_parameter(f"{name}.alpha", torch.full((1,), 0.5), Slice((1,)), 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight, _ = self.parameters_in_use()
        return weight * x / (1 + (copy_to_tensor_ranks(self.alpha, self.partial_group) * x).abs())


class SigmoidGLU(MLP):
    """sigmoid(gate)·up."""

    gates = 2

    def activate(self, x: Tensor) -> Tensor:
        gate, up = torch.chunk(x, 2, dim=-1)
        return gate.sigmoid() * up


class LogLength(Position):
    """q_t · log(2 + t): no encoding of positions, but sharper attention at later ones."""

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q * (2 + self.places.of(q)[..., None]).to(q.dtype).log(), k


class GainAttention(Attention):
    """Every head's output times a trained number, cut over tensor ranks like the heads. `parts` is an older name of the context."""

    def __init__(self, name, parts):
        super().__init__(name, parts)
        heads, grid = parts.model.num_heads, parts.grid
        self.gain = make_parameter(f"{name}.gain", torch.ones(heads), Slice((heads,), 0, (heads,)), grid.tensor_rank, grid.tensor)

    def forward(self, x: Tensor, samples: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).split(self.qkv.parts, dim=-1)
        k, v = gather_shared(k, self.kv_group), gather_shared(v, self.kv_group)
        q, k, v = (rearrange(part, "b s (h e) -> b h s e", e=self.head_size) for part in (q, k, v))
        q, k = self.position.rotate(self.q_norm(q), self.k_norm(k))
        y = self.core(q, k, v, self.position.bias(q), samples) * self.gain[:, None, None]
        return self.output(rearrange(y, "b h s e -> b s (h e)"))


class SandwichBlock(Block):
    """x += norm(attention(norm(x))); x += mlp(norm(x)), with its own attention class and a third norm."""

    def __init__(self, name, parts):
        super().__init__(name, parts)
        self.attention = GainAttention(f"{name}.attention", parts)
        self.output_norm = parts.norm(f"{name}.output_norm", parts.model.hidden_size)

    def forward(self, x: Tensor, samples: Tensor | None = None) -> Tensor:
        x = x + self.output_norm(self.attend(self.attention_norm(x), samples))
        return x + self.think(self.mlp_norm(x), samples)


class WideInit(GPT2Init):
    """Projections into a branch are drawn ten times as wide."""

    def inner_std(self) -> float:
        return 0.2


SETTINGS = {"norm": SoftSign, "mlp": SigmoidGLU, "position": LogLength, "residual": SandwichBlock, "init": WideInit}
"""Model setting -> the class it names."""
VARIANTS = {variant.__name__: variant for variant in SETTINGS.values()}
NAMED = {setting: f"variant:{variant.__name__}" for setting, variant in SETTINGS.items()}
"""The model settings as they are in config.py."""
