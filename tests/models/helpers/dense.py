"""A whole GPT-2 from its formulas, with dropout masks from plain integers: the reference for a sliced model with dropout.

Pre-norm, layernorm, learned positions, tanh-GELU, every head its own keys, a head that is the embedding. Any precision.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from models.config import GPT
from tests.models.helpers.integers import is_dropped, true_place
from tests.models.helpers.reference import Weights, gelu_tanh, layernorm, linear


def kept(name: str, samples: Tensor, length: int, features: Iterable[int], p: float, seed: int) -> Tensor:
    """'b s f': 0 where the layer `name` drops, 1/(1 − p) elsewhere."""
    numbers = list(features)
    if not p:
        return torch.ones(len(samples), length, len(numbers), dtype=torch.float64)
    places = [[true_place(name, int(sample), position, seed) for position in range(length)] for sample in samples]
    drops = torch.tensor([[[is_dropped(place, feature, p) for feature in numbers] for place in row] for row in places])
    return (~drops).double() / (1 - p)


class Dense:
    """Loss and gradients of a model with these whole weights on these samples."""

    def __init__(self, model: GPT, weights: Weights, samples: Tensor, seed: int) -> None:
        self.model, self.samples, self.seed = model, samples, seed
        self.weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}

    def run(self, ids: Tensor, targets: Tensor, token_weights: Tensor) -> tuple[float, dict[str, Tensor]]:
        """(Σ weights · cross entropy, its gradients by logical name)."""
        log_probabilities = self.logits(ids).log_softmax(-1)
        loss = -(token_weights * log_probabilities.gather(-1, targets[..., None])[..., 0]).sum()
        loss.backward()
        return float(loss.detach()), {name: tensor.grad for name, tensor in self.weights.items()}

    def logits(self, ids: Tensor) -> Tensor:
        """'b s' -> 'b s v'."""
        table = self.weights["embedding.weight"]
        x = self.drop(table[ids] + self.weights["position.weight"][: ids.shape[1]], "embedding", self.model.embedding_dropout)
        for block in (f"blocks.{i}" for i in range(self.model.num_layers)):
            y = self.attention(self.norm(x, f"{block}.attention_norm"), f"{block}.attention")
            x = x + self.drop(y, f"{block}.attention.residual", self.model.residual_dropout)
            y = self.mlp(self.norm(x, f"{block}.mlp_norm"), f"{block}.mlp")
            x = x + self.drop(y, f"{block}.mlp.residual", self.model.residual_dropout)
        return self.norm(x, "final_norm") @ table.T

    def attention(self, x: Tensor, name: str) -> Tensor:
        length, e, p = x.shape[1], self.model.head_size, self.model.attention_dropout
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        q, k, v = linear(x, self.weights, f"{name}.qkv").chunk(3, dim=-1)
        heads = []
        for h in range(self.model.num_heads):
            of_head = slice(h * e, (h + 1) * e)
            scores = torch.einsum("bte,bue->btu", q[..., of_head], k[..., of_head]) / math.sqrt(e)
            mask = kept(name, self.samples, length, ((h << 32) + u for u in range(length)), p, self.seed)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) * mask @ v[..., of_head])
        return linear(torch.cat(heads, -1), self.weights, f"{name}.output")

    def mlp(self, x: Tensor, name: str) -> Tensor:
        y = self.drop(gelu_tanh(linear(x, self.weights, f"{name}.up")), name, self.model.mlp_dropout)
        return linear(y, self.weights, f"{name}.down")

    def norm(self, x: Tensor, name: str) -> Tensor:
        return layernorm(x, self.weights, name, self.model.norm_eps)

    def drop(self, x: Tensor, name: str, p: float) -> Tensor:
        return x * kept(name, self.samples, x.shape[1], range(x.shape[2]), p, self.seed)
