"""Weight initialisation: each parameter is drawn whole, on the CPU, in fp32, from a generator seeded by (seed, logical name).

So initial values do not depend on the layout or on other parameters: adding a layer does not change the rest.
"""

import math

import numpy as np
import torch
from torch import Tensor

from models.encoder_config import AnyModel
from models.seed import seed_of


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose numbers depend on (seed, name) alone."""
    return torch.Generator().manual_seed(seed_of(seed, name))


def normal(seed: int, name: str, shape: tuple[int, ...], std: float) -> Tensor:
    """N(0, std²) in fp32, equal for equal (seed, name, shape).

    The memory is allocated by numpy because `deepspeed.zero.Init` patches torch's constructors to use the training precision,
    and drawing in bf16 gives other numbers.
    """
    return torch.from_numpy(np.empty(shape, np.float32)).normal_(0.0, std, generator=generator(seed, name))


class GPT2Init:
    """N(0, 0.02²); projections onto the residual stream × 1/√(2·layers) (GPT-2, §2.3; arXiv:1909.08053).

    A variant overrides the three standard deviations. `embedding`, `inner` and `residual` are each a `parallel.linear.Draw`.
    """

    def __init__(self, model: AnyModel, seed: int) -> None:
        self.model, self.seed = model, seed

    def embedding_std(self) -> float:
        """Standard deviation of token and position tables and of an untied head."""
        return 0.02

    def inner_std(self) -> float:
        """Standard deviation of projections into a branch: q, k, v, gate, up."""
        return 0.02

    def residual_std(self) -> float:
        """Standard deviation of projections back onto the residual stream: attention output, MLP down."""
        return 0.02 / math.sqrt(2 * self.model.num_layers)

    def embedding(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A whole table."""
        return normal(self.seed, name, shape, self.embedding_std())

    def inner(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A whole projection into a branch."""
        return normal(self.seed, name, shape, self.inner_std())

    def residual(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A whole projection onto the residual stream."""
        return normal(self.seed, name, shape, self.residual_std())


class SmallWangInit(GPT2Init):
    """GPT-NeoX-20B: √(2/(5h)) (arXiv:1910.05895); onto the residual stream 2/(layers·√h) (Wang & Komatsuzaki, GPT-J)."""

    def embedding_std(self) -> float:
        return math.sqrt(2 / (5 * self.model.hidden_size))

    def inner_std(self) -> float:
        return math.sqrt(2 / (5 * self.model.hidden_size))

    def residual_std(self) -> float:
        return 2 / (self.model.num_layers * math.sqrt(self.model.hidden_size))


class T5Init(GPT2Init):
    """N(0, 1) tables, and projections whose outputs have the variance of their inputs: N(0, 1/inputs) (arXiv:1910.10683's code).

    An untied head counts as a projection. models/t5_attention.py divides what it draws for queries by √e, because scores are not.
    """

    def embedding_std(self) -> float:
        return 1.0

    def inner_std(self) -> float:
        return 1 / math.sqrt(self.model.hidden_size)

    def residual(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A whole projection onto the residual stream, from shape[1] features."""
        return normal(self.seed, name, shape, 1 / math.sqrt(shape[1]))


class UninitializedWeights(GPT2Init):
    """Zeros, which cost no time: for a model whose weights are then all read from a file."""

    def embedding(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Zeros that take no memory until a rank takes its slice."""
        return torch.zeros(()).expand(shape)

    inner = residual = embedding


INITS = {"gpt2": GPT2Init, "small_wang": SmallWangInit}
T5_INITS = {**INITS, "t5": T5Init}
