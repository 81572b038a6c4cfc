"""Decoding with a T5: sources are read by the encoder once, and their keys and values are kept for the decoder's cross attention.

`T5Decoder` has the interface of a Decoder: what it admits are sources, and what it reads token by token are targets.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from models.config import VARIANT
from models.encoder_config import T5
from models.inference.cache import CachedCore, CacheRows, KeyValueCache, install_cache
from models.inference.decoder import Decoder
from models.inference.driver import DriverDecoder
from models.inference.packed_weights import pack_weights
from models.inference.variant_check import UnusableLogits
from models.t5 import DecoderBlock, DecoderNorm, EncoderBlock, EncoderNorm
from models.t5_attention import CrossAttention, visible_sources
from parallel.grid import Grid
from parallel.layers import PlainModule


class CachedCrossAttention(KeyValueCache):
    """Cross attention to a cache 'slots h length e' of the keys and values of this rank's heads, which `read` writes."""

    def __init__(self, attention: CrossAttention, rows: CacheRows, heads: int, length: int, dtype: torch.dtype) -> None:
        super().__init__(rows, heads, length, attention.head_size, dtype)
        self.attention = attention

    def read(self, source: Tensor) -> None:
        """Writes the keys and values of the encoder's output 'n s d' into the rows of the current pass."""
        where = slice(self.rows.first, len(self.rows.lengths)), slice(None), slice(source.shape[1])
        self.keys[where], self.values[where] = self.attention.keys_and_values(source)

    def forward(self, x: Tensor, source: Tensor | None, bias: Tensor, samples: Tensor | None = None) -> Tensor:
        """x 'n t d' of the rows of the current pass, bias 'n 1 t s' -> 'n t d'. `source` and `samples` are not used."""
        q = self.attention.queries(x).to(self.dtype)
        used = slice(self.rows.first, len(self.rows.lengths)), slice(None), slice(bias.shape[-1])
        scale = 1 / self.attention.core.divisor(q)
        y = F.scaled_dot_product_attention(q, self.keys[used], self.values[used], attn_mask=bias.to(self.dtype), scale=scale)
        return self.attention.output(rearrange(y.to(x.dtype), "n h t e -> n t (h e)"))


class EncoderDecoderSequences:
    """Sequences of a T5 (models/inference/sequences.py): each begins with the token `start`, and has a source. Changes the module."""

    def __init__(self, module: PlainModule, model: T5, grid: Grid, slots: int, length: int, start: int) -> None:
        self.start, self.source_length = start, model.source_length
        parameter = next(module.parameters())
        self.rows = CacheRows(slots, length, parameter.device)
        self.source_lengths: list[int] = []
        """Tokens in the source of each row in use."""
        parts = [call for _, call in module.steps]
        self.embedding = parts[0]
        self.encoder = [part for part in parts if isinstance(part, EncoderBlock)]
        self.decoder = [part for part in parts if isinstance(part, DecoderBlock)]
        (self.encoder_norm,) = (part for part in parts if isinstance(part, EncoderNorm))
        (self.decoder_norm,) = (part for part in parts if isinstance(part, DecoderNorm))
        heads = model.num_heads // grid.tensor
        self.sources: list[CachedCrossAttention] = []
        self.targets: list[CachedCore] = []
        for block in self.decoder:
            cross = CachedCrossAttention(block.cross_attention, self.rows, heads, self.source_length, parameter.dtype)
            block.cross_attention = cross
            self.sources.append(cross)
            self.targets += install_cache(block, self.rows, heads)

    @property
    def lengths(self) -> list[int]:
        """Tokens of the target in each row in use, `start` included."""
        return self.rows.lengths

    def admit(self, sources: Sequence[Sequence[int]]) -> Tensor:
        """One pass of the encoder over the sources, and one of the decoder over the first token of as many new rows."""
        lengths = [len(source) for source in sources]
        if not 0 < min(lengths) <= max(lengths) <= self.source_length:
            raise ValueError(f"sources of {lengths} tokens do not fit: they may have 1 to {self.source_length}")
        self.rows.prefill([1] * len(sources))
        self.source_lengths += lengths
        encoded = self._encode(sources)
        for cross in self.sources:
            cross.read(encoded)
        return self._decode([self.start] * len(sources))

    def step(self, ids: Sequence[int]) -> Tensor:
        """One pass over one token per row."""
        self.rows.advance()
        return self._decode(ids)

    def drop(self, row: int) -> None:
        """Copies the last row to the freed one."""
        last, length, source_length = len(self.lengths) - 1, self.rows.lengths.pop(), self.source_lengths.pop()
        if row != last:
            for cache, tokens in self._caches(length, source_length):
                cache.move(last, row, tokens)
            self.rows.lengths[row], self.source_lengths[row] = length, source_length

    def reorder(self, parents: Sequence[int]) -> None:
        """Copies rows, unless each stays where it is. The beams of one source have equal sources, which are not copied again."""
        lengths, source_lengths = ([of[parent] for parent in parents] for of in (self.lengths, self.source_lengths))
        if list(parents) != list(range(len(parents))):
            index = torch.tensor(parents, device=self.rows.device)
            for cache, tokens in self._caches(max(lengths), max(source_lengths)):
                cache.gather(index, tokens)
        self.rows.lengths, self.source_lengths = lengths, source_lengths

    def clear(self) -> None:
        """Frees all rows."""
        self.rows.lengths, self.source_lengths = [], []

    def _caches(self, length: int, source_length: int) -> list[tuple[KeyValueCache, int]]:
        """Every cache, with the number of tokens of it that are in use."""
        return [*((cache, length) for cache in self.targets), *((cache, source_length) for cache in self.sources)]

    def _encode(self, sources: Sequence[Sequence[int]]) -> Tensor:
        """'n s d', the encoder's output. Shorter sources are padded at the end, which no token of a source attends to."""
        ids = torch.zeros((len(sources), max(map(len, sources))), dtype=torch.int64)
        padding = torch.ones_like(ids)
        for i, source in enumerate(sources):
            ids[i, : len(source)], padding[i, : len(source)] = torch.tensor(source), 0
        x, padding = self.embedding(ids.to(self.rows.device)), padding.to(self.rows.device)
        for block in self.encoder:
            x = block.encode(x, None, padding)
        return self.encoder_norm.finish(x)

    def _decode(self, ids: Sequence[int]) -> Tensor:
        """'n d' after one token of each row of the current pass."""
        x = self.embedding(torch.tensor(ids, device=self.rows.device)[:, None])  # n 1 d
        lengths = torch.tensor(self.source_lengths[self.rows.first :], device=x.device)[:, None]
        places = torch.arange(max(self.source_lengths[self.rows.first :]), device=x.device)
        bias = visible_sources(torch.zeros_like(lengths), (places >= lengths).long(), x.dtype)  # n 1 1 s
        for block in self.decoder:
            x = block.decode(x, None, bias)
        return self.decoder_norm.finish(x)[:, 0]


class T5Decoder(Decoder):
    """Decodes with a T5, which it changes and owns from now on, over `slots` rows: a source, and a target of up to `length` tokens.

    `admit` takes sources, of 1 to model.source_length tokens, and returns the logits of the first token of each target: after the token
    `start`, which is part of `lengths`. Everything else is as in Decoder.
    """

    def __init__(self, module: PlainModule, model: T5, grid: Grid, slots: int, length: int, start: int) -> None:
        if model.mlp.startswith(VARIANT):
            raise UnusableLogits(
                f"model.mlp = {model.mlp!r}: whether a class of variant.py may be computed token by token is not tried for a T5 → "
                "use a registered mlp, or evaluate its validation loss"
            )
        self.module, self.model, self.grid, self.slots, self.length = module.eval(), model, grid, slots, length
        self.uncached, self.start = None, start
        pack_weights(module, slots, release=True)
        self.sequences = EncoderDecoderSequences(module, model, grid, slots, length, start)

    def continued(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """The start token: new tokens continue no source."""
        return (self.start,)

    @property
    def cache_bytes(self) -> int:
        """Size of this rank's caches of sources and targets."""
        assert isinstance(self.sequences, EncoderDecoderSequences)
        caches = [*self.sequences.sources, *self.sequences.targets]
        return sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)


class DriverT5Decoder(DriverDecoder, T5Decoder):
    """A T5Decoder whose methods run on all tensor ranks when they are called on tensor rank 0."""
