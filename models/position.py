"""Position encodings: learned and sinusoidal embeddings, rotary (RoPE) with its scalings for long texts, ALiBi, and none.

Tables are computed where they are used, in fp32: a buffer would be rounded to bf16 together with the weights.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from models.config import GPT
from models.encoder_config import AnyModel
from models.init import GPT2Init
from models.segments import SegmentPositions
from models.token_positions import TokenPositions
from parallel.collectives import copy_to_tensor_ranks
from parallel.grid import Grid
from parallel.region import region_of
from parallel.slices import Slice, make_parameter


class Position(nn.Module):
    """No position encoding, and the base class of the others.

    Schemes with `at_input = True` are a layer of their own behind the embedding, x -> forward(x). The others are part of every
    attention: `rotate` changes its queries and keys, `bias` is added to its scores.

    A scheme must take positions from `self.places` instead of counting tokens: during decoding the tokens of a pass are at other
    positions, different ones in each row of the batch, and there are more keys than queries.
    """

    at_input = False

    def __init__(self, name: str, model: AnyModel, init: GPT2Init, grid: Grid) -> None:
        super().__init__()
        self.model, self.grid, self.region = model, grid, region_of(grid)
        self.places = TokenPositions(self.region)

    @contextlib.contextmanager
    def at(self, segments: Tensor | None) -> Iterator[None]:
        """The positions are those of packed documents, segments 'b s', until the context is left. None: as they were."""
        before = self.places
        if segments is not None:
            self.places = SegmentPositions(self.region, segments)
        try:
            yield
        finally:
            self.places = before

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """'b s d' -> 'b s d'; under sequence parallelism this rank's positions. Packed documents: segments 'b s', see `at`."""
        return x

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q 'b h s e', k 'b k s e' of this rank's heads -> the same shapes."""
        return q, k

    def bias(self, q: Tensor) -> Tensor | None:
        """'h s t' (or 'b h s t') for s queries and t keys, causal mask included, in q's dtype. None: only the causal mask.

        A bias that is the same for all heads may have 1 in place of h, or be 's t'.
        """
        return None


class Learned(Position):
    """x_t + P_t with a trained table P: 'seq_length d' (GPT-2)."""

    at_input = True

    def __init__(self, name: str, model: AnyModel, init: GPT2Init, grid: Grid) -> None:
        super().__init__(name, model, init, grid)
        cut = Slice((model.seq_length, model.hidden_size))
        self.weight = make_parameter(f"{name}.weight", init.embedding(f"{name}.weight", cut.shape), cut, 0, 1)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        table = copy_to_tensor_ranks(self.weight, self.region.partial_group)
        with self.at(segments):
            return x + self.places.rows(table, x)


class Sinusoidal(Position):
    """x_t + P_t, P_{t,2i} = sin(t/10000^{2i/d}), P_{t,2i+1} = cos(same) (arXiv:1706.03762, §3.5)."""

    at_input = True

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        with self.at(segments):
            places = self.places.own(x)
        angles = places[..., None].float() * _frequencies(x.shape[2], 10_000.0, x.device)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., : x.shape[2]]
        return x + table.to(x.dtype)


class Rotary(Position):
    """Rotates pairs (i, i + r/2) of the first r = rotary_fraction · head_size features by t·base^{−2i/r} (arXiv:2104.09864).

    `model.rotary_scaling` may lower these frequencies for long texts, see `ROTARY_SCALINGS`.
    """

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q 'b h s e', k 'b k s e': the first r features of each head rotated, the rest unchanged."""
        model = self.model
        assert isinstance(model, GPT)  # the other kinds have schemes of their own
        fraction, base = model.rotary_fraction, model.rotary_base
        assert fraction is not None and base is not None  # config validates
        rotated = int(q.shape[-1] * fraction) // 2 * 2

        def make() -> tuple[Tensor, Tensor]:
            frequencies = scaled(_frequencies(rotated, base, q.device), model)
            angles = self.places.of(q)[..., None].float() * frequencies
            return angles.cos().to(q.dtype), angles.sin().to(q.dtype)

        cos, sin = self.places.once((type(self), rotated, q.dtype), make)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)


class Alibi(Position):
    """score(t, u) − slope_h · (t − u), the slopes a geometric series over the heads of all ranks (arXiv:2108.12409)."""

    def bias(self, q: Tensor) -> Tensor:
        """'h s t' for this rank's heads ('n h 1 t' during decoding)."""
        heads = q.shape[1]
        first = self.grid.tensor_rank * heads

        def make() -> Tensor:
            slopes = torch.tensor(alibi_slopes(self.model.num_heads)[first : first + heads], device=q.device)
            distance = self.places.of(q)[..., :, None] - self.places.of_keys(q)
            bias = -slopes[:, None, None] * distance.float()
            return bias.masked_fill(distance < 0, -torch.inf).to(q.dtype)

        return self.places.once((type(self), q.dtype), make)


def alibi_slopes(heads: int) -> list[float]:
    """2^{−8i/n} for n a power of two. Otherwise the series of the power below, then every other slope of the power above."""
    power = 2 ** math.floor(math.log2(heads))
    series = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]
    return series + between


def _frequencies(size: int, base: float, device: torch.device) -> Tensor:
    """'⌈size/2⌉' in fp32, in radians per token: base^{−2i/size} for pair i."""
    exponents = torch.arange(0, size, 2, device=device, dtype=torch.float32) / max(size, 1)
    return 1.0 / base**exponents  # not base**-exponents, an ulp away from transformers: 1e-4 in an angle at position 2,000


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def scaled(frequencies: Tensor, model: GPT) -> Tensor:
    """Rotary frequencies 'i' (fp32, radians per token) after `model.rotary_scaling`. A variant may leave the setting out: no scaling."""
    return ROTARY_SCALINGS[model.rotary_scaling or "none"](frequencies, model)


def unscaled(frequencies: Tensor, model: GPT) -> Tensor:
    """The frequencies unchanged."""
    return frequencies


def linear(frequencies: Tensor, model: GPT) -> Tensor:
    """All frequencies divided by the factor: positions t / factor (arXiv:2306.15595)."""
    assert model.rotary_factor is not None  # config validates
    return frequencies / model.rotary_factor


def llama3(frequencies: Tensor, model: GPT) -> Tensor:
    """Short wavelengths unchanged, long ones divided by the factor, those between interpolated (Llama 3.1, arXiv:2407.21783, §3.4).

    The same operations in the same order as in transformers, so that equal settings give equal bits.
    """
    factor, low, high, length = model.rotary_factor, model.rotary_low_factor, model.rotary_high_factor, model.rotary_original_length
    assert factor is not None and low is not None and high is not None and length is not None  # config validates
    wavelengths = 2 * math.pi / frequencies
    divided = torch.where(wavelengths > length / low, frequencies / factor, frequencies)
    smooth = (length / wavelengths - low) / (high - low)
    between = (wavelengths >= length / high) & (wavelengths <= length / low)
    return torch.where(between, (1 - smooth) * divided / factor + smooth * divided, divided)


ROTARY_SCALINGS: dict[str, Callable[[Tensor, GPT], Tensor]] = {"none": unscaled, "linear": linear, "llama3": llama3}
"""`model.rotary_scaling` -> how it changes the frequencies."""

POSITIONS = {"learned": Learned, "sinusoidal": Sinusoidal, "rotary": Rotary, "alibi": Alibi, "none": Position}
