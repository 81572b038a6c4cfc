"""Stateless dropout: the mask is a hash of an element's position in the model and in the data, not the output of a generator.

keep(seed, layer's logical name, global sample index counted over epochs, absolute position, global feature or head). So the
mask is the same on every layout, in every recomputation and after every resume, and there is no generator state to save.

The first four inputs are hashed in 64 bits, once per position. Each feature then costs one short 32-bit round.
"""

import torch
from torch import Tensor, nn

from models.seed import seed_of
from models.token_positions import TokenPositions
from parallel.grid import Grid
from parallel.region import region_of

MIX_64 = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""The multipliers of splitmix64, as signed numbers."""
MIX_32 = (0x7FEB352D, -0x7B935975)
"""The multipliers of Wellons' low-bias 32-bit hash, as signed numbers."""


class Dropout(nn.Module):
    """x · keep / (1 − p) in training, x in evaluation; keep is 1 with probability 1 − p and 0 otherwise.

    x: 'b s d', or this rank's positions or features of it; samples: 'b', global sample indices (may be None in evaluation).
    `sliced`: True inside a sliced region, where this rank holds its own features of every position; False outside, where it
    holds all features of the positions that its region assigns to it.
    """

    def __init__(self, name: str, p: float, seed: int, grid: Grid, sliced: bool = False) -> None:
        super().__init__()
        self.p, self.key = p, seed_of(seed, f"{name}.dropout")
        self.places, self.sliced = TokenPositions(region_of(grid)), sliced
        self.feature_rank = grid.tensor_rank if sliced else 0

    def forward(self, x: Tensor, samples: Tensor | None = None) -> Tensor:
        """'b s d' -> 'b s d'."""
        if not (self.training and self.p):
            return x
        positions = self.places.of(x) if self.sliced else self.places.own(x)
        hashes = mixed(self.key, samples, positions)  # b s
        features = torch.arange(x.shape[2], device=x.device) + self.feature_rank * x.shape[2]
        return x.masked_fill(dropped(hashes, features, self.p), 0.0) * (1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def mixed(key: int, samples: Tensor | None, positions: Tensor) -> Tensor:
    """A 64-bit hash for each sample 'b' and position 's' (or 'b s') of the layer `key`: int64 'b s'."""
    if samples is None:  # a block that does not pass them on would otherwise train without dropout, and nobody would notice
        raise ValueError("dropout in training needs the samples' numbers 'b' (MicroBatch.context), handed on by every module to its parts")
    of_sample = _mix_64(samples.to(torch.int64) + key)
    return _mix_64(of_sample[:, None] + positions * MIX_64[0])


def dropped(hashes: Tensor, features: Tensor, p: float) -> Tensor:
    """'…' hashes and 'd' feature numbers -> '… d' bool, True with probability p."""
    low, high = hashes.to(torch.int32), (hashes >> 32).to(torch.int32)
    h = low[..., None] ^ _mix_64(features).to(torch.int32)
    h = h.mul_(MIX_32[0]).add_(high[..., None])
    h ^= h >> 15
    h.mul_(MIX_32[1])
    return h < int(p * 2**32) - 2**31


def _mix_64(x: Tensor) -> Tensor:
    """A bijection of int64 in which every input bit affects every output bit (the finaliser of splitmix64)."""
    for bits, multiplier in ((30, MIX_64[0]), (27, MIX_64[1])):
        logical_shift = (x >> bits) & ((1 << (64 - bits)) - 1)  # >> alone is arithmetic: it copies the sign bit
        x = (x ^ logical_shift) * multiplier
    return x ^ ((x >> 31) & ((1 << 33) - 1))
