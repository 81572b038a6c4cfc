"""Stateless dropout: the mask is a hash of where an element is, never of what was computed before.

keep(seed, layer's logical name, global sample index counted over epochs, absolute position, global feature or head): so the
mask is the same on every layout, in every recomputation and after every resume, and there is no generator to save.

The first four are mixed well, in 64 bits, once a position; each feature then costs one short 32-bit round on top.
"""

import torch
from torch import Tensor, nn

from models.seed import seed_of
from parallel.grid import Grid
from parallel.region import region_of

MIX_64 = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # splitmix64's multipliers as signed numbers
MIX_32 = (0x7FEB352D, -0x7B935975)  # Wellons' low-bias 32-bit hash, likewise


class Dropout(nn.Module):
    """x · keep / (1 − p) while training, x in evaluation; keep is 1 with probability 1 − p.

    x: 'b s d', or this rank's positions or features of it; samples: 'b', global sample indices (None will do in evaluation).
    `sliced`: whether this rank holds its own features of every position (inside a sliced region) or all features of the
    positions that its region has out here.
    """

    def __init__(self, name: str, p: float, seed: int, grid: Grid, sliced: bool = False) -> None:
        super().__init__()
        self.p, self.key = p, seed_of(seed, f"{name}.dropout")
        self.region, self.feature_rank = region_of(grid), grid.tensor_rank if sliced else 0
        self.sliced = sliced

    def forward(self, x: Tensor, samples: Tensor | None = None) -> Tensor:
        """'b s d' -> 'b s d'."""
        if not (self.training and self.p):
            return x
        first = 0 if self.sliced else self.region.first_position(x)
        places = mixed(self.key, samples, first, x.shape[1])  # b s
        features = torch.arange(x.shape[2], device=x.device) + self.feature_rank * x.shape[2]
        return x.masked_fill(dropped(places, features, self.p), 0.0) * (1 / (1 - self.p))

    def extra_repr(self) -> str:
        """The probability of being dropped."""
        return f"p={self.p}"


def mixed(key: int, samples: Tensor | None, first: int, length: int) -> Tensor:
    """'b s': 64 well-mixed bits for each (sample, position first … first + length − 1) of the layer `key`. int64."""
    if samples is None:  # a block that does not hand them on would silently train without dropout
        raise ValueError("dropout in training needs the samples' numbers 'b' (MicroBatch.context), handed on by every module to its parts")
    places = torch.arange(first, first + length, device=samples.device)
    of_sample = _mix_64(samples.to(torch.int64) + key)
    return _mix_64(of_sample[:, None] + places[None, :] * MIX_64[0])


def dropped(places: Tensor, features: Tensor, p: float) -> Tensor:
    """'…' hashes and 'd' feature numbers -> '… d' bool, True with probability p."""
    low, high = places.to(torch.int32), (places >> 32).to(torch.int32)
    h = low[..., None] ^ _mix_64(features).to(torch.int32)
    h = h.mul_(MIX_32[0]).add_(high[..., None])
    h ^= h >> 15
    h.mul_(MIX_32[1])
    return h < int(p * 2**32) - 2**31


def _mix_64(x: Tensor) -> Tensor:
    """A bijection of int64 in which every input bit reaches every output bit (splitmix64's finaliser)."""
    x = (x ^ _shifted(x, 30)) * MIX_64[0]
    x = (x ^ _shifted(x, 27)) * MIX_64[1]
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
