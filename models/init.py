"""How weights begin: drawn whole, on the CPU, in fp32, from a generator keyed on (seed, logical name).

So a parameter's first value depends on neither the layout nor the other parameters: add a layer, and the rest stays the same.
"""

import math

import numpy as np
import torch
from torch import Tensor

from models.config import GPT
from models.seed import seed_of


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose stream depends on (seed, name) alone."""
    return torch.Generator().manual_seed(seed_of(seed, name))


def normal(seed: int, name: str, shape: tuple[int, ...], std: float) -> Tensor:
    """N(0, std²) in fp32, equal for equal (seed, name, shape).

    The memory comes from numpy because `deepspeed.zero.Init` patches torch's constructors to round to the training precision,
    and a draw in bf16 is another stream of numbers.
    """
    return torch.from_numpy(np.empty(shape, np.float32)).normal_(0.0, std, generator=generator(seed, name))


class GPT2Init:
    """N(0, 0.02²) everywhere; what is added to the residual stream × 1/√(2·layers) (GPT-2, §2.3; arXiv:1909.08053).

    A variant overrides the three standard deviations. Each method is a `parallel.linear.Draw`.
    """

    def __init__(self, model: GPT, seed: int) -> None:
        self.model, self.seed = model, seed

    def embedding_std(self) -> float:
        """Of token and position tables and of an untied head."""
        return 0.02

    def inner_std(self) -> float:
        """Of projections into a branch: q, k, v, gate, up."""
        return 0.02

    def residual_std(self) -> float:
        """Of projections back onto the residual stream: attention output, MLP down."""
        return 0.02 / math.sqrt(2 * self.model.num_layers)

    def embedding(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A table, whole."""
        return normal(self.seed, name, shape, self.embedding_std())

    def inner(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A projection into a branch, whole."""
        return normal(self.seed, name, shape, self.inner_std())

    def residual(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A projection onto the residual stream, whole."""
        return normal(self.seed, name, shape, self.residual_std())


class SmallWangInit(GPT2Init):
    """GPT-NeoX-20B's: √(2/(5h)) (arXiv:1910.05895), residual outputs 2/(layers·√h) (Wang & Komatsuzaki, GPT-J)."""

    def embedding_std(self) -> float:
        """√(2/(5h))."""
        return math.sqrt(2 / (5 * self.model.hidden_size))

    def inner_std(self) -> float:
        """√(2/(5h))."""
        return math.sqrt(2 / (5 * self.model.hidden_size))

    def residual_std(self) -> float:
        """2/(layers·√h)."""
        return 2 / (self.model.num_layers * math.sqrt(self.model.hidden_size))


class UninitializedWeights(GPT2Init):
    """Zeros, at no cost: for a model whose every weight is about to be read from a file."""

    def embedding(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A table of zeros that takes no memory until it is cut."""
        return torch.zeros(()).expand(shape)

    inner = residual = embedding


INITS = {"gpt2": GPT2Init, "small_wang": SmallWangInit}
