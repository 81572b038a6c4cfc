"""How a token knows its place: added at the input, turned into queries and keys, or a bias on attention scores.

Tables are computed where they are used, in fp32: a buffer would be rounded to bf16 together with the weights.
"""
# MERGED-DOC """Rotary frequencies made lower, so that a model reads texts longer than those it was first trained on."""

import math
from collections.abc import Callable, Hashable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.config import GPT
from models.init import GPT2Init
from parallel.collectives import copy_to_tensor_ranks
from parallel.grid import Grid
from parallel.region import region_of
from parallel.slices import Slice, make_parameter


def scaled(frequencies: Tensor, model: GPT) -> Tensor:
    """The frequencies of the pairs, radians a token, 'i' fp32, as `model.rotary_scaling` has them; a variant may leave it out."""
    return ROTARY_SCALINGS[model.rotary_scaling or "none"](frequencies, model)


def unscaled(frequencies: Tensor, model: GPT) -> Tensor:
    """As they are."""
    return frequencies


def linear(frequencies: Tensor, model: GPT) -> Tensor:
    """All of them divided by the factor: positions t / factor (arXiv:2306.15595)."""
    assert model.rotary_factor is not None  # config validates
    return frequencies / model.rotary_factor


def llama3(frequencies: Tensor, model: GPT) -> Tensor:
    """Short wavelengths as they are, long ones divided by the factor, in between a mean of both (Llama 3.1, arXiv:2407.21783, §3.4).

    Operation for operation as transformers has it, so that equal settings give equal bits.
    """
    factor, low, high, length = model.rotary_factor, model.rotary_low_factor, model.rotary_high_factor, model.rotary_original_length
    assert factor is not None and low is not None and high is not None and length is not None  # config validates
    wavelengths = 2 * math.pi / frequencies
    found = torch.where(wavelengths > length / low, frequencies / factor, frequencies)
    smooth = (length / wavelengths - low) / (high - low)
    between = (wavelengths >= length / high) & (wavelengths <= length / low)
    return torch.where(between, (1 - smooth) * found / factor + smooth * found, found)


ROTARY_SCALINGS: dict[str, Callable[[Tensor, GPT], Tensor]] = {"none": unscaled, "linear": linear, "llama3": llama3}


Made = TypeVar("Made")


class TokenPositions:
    """Where in their sequences the tokens at hand are: 0, 1, 2, … of a whole one. models/inference/cache.py has the other kind."""

    def of(self, x: Tensor, first: int = 0) -> Tensor:
        """Of x '… s d', whose first is at `first`: int64 's', or something that goes with '… s'."""
        return torch.arange(first, first + x.shape[-2], device=x.device)

    def of_keys(self, x: Tensor) -> Tensor:
        """Of the keys that queries x 'b h s e' look at: 't'."""
        return self.of(x)

    def rows(self, table: Tensor, x: Tensor, first: int = 0) -> Tensor:
        """The rows of a table 'seq_length d' at the places of x 'b s d': 's d', or 'b s d'."""
        return table[first : first + x.shape[1]]

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` makes of these places, which other layers may have made already under the same key."""
        return make()


class Position(nn.Module):
    """No position at all, and the base of the others.

    `at_input` schemes become a layer of their own behind the embedding, x -> forward(x). The others live in every attention:
    `rotate` turns its queries and keys, `bias` is added to its scores.

    A scheme asks `self.places` where its tokens are, instead of counting them: a decoder gives it other places, of which each
    row of a batch has its own, and keys that lie further back than the queries at hand.
    """

    at_input = False

    def __init__(self, name: str, model: GPT, init: GPT2Init, grid: Grid) -> None:
        super().__init__()
        self.model, self.grid, self.region = model, grid, region_of(grid)
        self.places = TokenPositions()

    def forward(self, x: Tensor) -> Tensor:
        """'b s d' -> 'b s d'."""
        return x

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q 'b h s e', k 'b k s e' of this rank's heads, unchanged in shape."""
        return q, k

    def bias(self, q: Tensor) -> Tensor | None:
        """'h s t' (or 'b h s t') for s queries and t keys, causal mask included, in q's dtype; None: plain causal attention."""
        return None


class Learned(Position):
    """x_t + P_t with a trained table P: 'seq_length d' (GPT-2)."""

    at_input = True

    def __init__(self, name: str, model: GPT, init: GPT2Init, grid: Grid) -> None:
        super().__init__(name, model, init, grid)
        cut = Slice((model.seq_length, model.hidden_size))
        self.weight = make_parameter(f"{name}.weight", init.embedding(f"{name}.weight", cut.shape), cut, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """'b s d' -> 'b s d', s ≤ seq_length; under sequence parallelism this rank's positions."""
        table = copy_to_tensor_ranks(self.weight, self.region.partial_group)
        return x + self.places.rows(table, x, self.region.first_position(x))


class Sinusoidal(Position):
    """x_t + P_t, P_{t,2i} = sin(t/10000^{2i/d}), P_{t,2i+1} = cos(same) (arXiv:1706.03762, §3.5)."""

    at_input = True

    def forward(self, x: Tensor) -> Tensor:
        """'b s d' -> 'b s d'."""
        angles = _angles(self.places.of(x, self.region.first_position(x)), x.shape[2], 10_000.0)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., : x.shape[2]]
        return x + table.to(x.dtype)


class Rotary(Position):
    """Pairs (i, i + r/2) of the first r = fraction·head_size features turn by t·base^{−2i/r} (arXiv:2104.09864).

    models/position.py makes those frequencies lower for long texts.
    """

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q 'b h s e', k 'b k s e': the first r features of each head turned, the rest as they were."""
        assert self.model.rotary_fraction is not None and self.model.rotary_base is not None  # config validates
        turned = int(q.shape[-1] * self.model.rotary_fraction) // 2 * 2
        cos, sin = self.places.once((type(self), turned, q.dtype), lambda: self._factors(q, turned))
        return _turn(q, cos, sin), _turn(k, cos, sin)

    def _factors(self, q: Tensor, turned: int) -> tuple[Tensor, Tensor]:
        assert self.model.rotary_base is not None
        angles = _angles(self.places.of(q), turned, self.model.rotary_base, partial(scaled, model=self.model))
        return angles.cos().to(q.dtype), angles.sin().to(q.dtype)


class Alibi(Position):
    """score(t, u) − slope_h · (t − u), the slopes a geometric series over *all* heads (arXiv:2108.12409)."""

    def bias(self, q: Tensor) -> Tensor:
        """'h s t' for this rank's heads."""
        return self.places.once((type(self), q.dtype), lambda: self._bias(q))

    def _bias(self, q: Tensor) -> Tensor:
        heads = q.shape[1]
        first = self.grid.tensor_rank * heads
        slopes = torch.tensor(alibi_slopes(self.model.num_heads)[first : first + heads], device=q.device)
        distance = self.places.of(q)[..., :, None] - self.places.of_keys(q)
        bias = -slopes[:, None, None] * distance.float()
        return bias.masked_fill(distance < 0, -torch.inf).to(q.dtype)


def alibi_slopes(heads: int) -> list[float]:
    """2^{−8i/n} for n a power of two; otherwise the series of the power below, then every other one of the power above."""
    power = 2 ** math.floor(math.log2(heads))
    series = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]
    return series + between


def _angles(places: Tensor, size: int, base: float, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """'…' -> '… ⌈size/2⌉' in fp32: position t, pair i -> t · base^{−2i/size}, the frequencies changed before they meet the positions."""
    exponents = torch.arange(0, size, 2, device=places.device, dtype=torch.float32) / max(size, 1)
    frequencies = 1.0 / base**exponents  # not base**-exponents, an ulp away from transformers: 1e-4 in an angle at position 2,000
    frequencies = change(frequencies) if change else frequencies
    return places[..., None].float() * frequencies


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


POSITIONS = {"learned": Learned, "sinusoidal": Sinusoidal, "rotary": Rotary, "alibi": Alibi, "none": Position}
