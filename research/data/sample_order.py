"""The order of a run's samples: which sample of which source each one is, as a function of its number. Nothing is stored."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from research.data import order
from research.data.blend import BLOCK, KEPT_BLOCKS, Blend

SPAN = 4 * BLOCK
"""Samples that are located together. order.sample costs each of 8,192 samples half as much as each of 2,048."""


class Located(NamedTuple):
    """Where samples of a run lie: the number of each one's source, its number in that source, and the source's epoch. Of one shape."""

    sources: np.ndarray
    windows: np.ndarray
    epochs: np.ndarray


class SampleOrder:
    """Locates samples in one or several sources, in the proportions of a blend.

    Each epoch of a source has an order of its own (order.py). The order of the only source is that of `seed`; of several, each has
    the order of `seed` and its name, so that it stays when others are added.
    """

    def __init__(self, blend: Blend, sizes: Sequence[int], seed: int) -> None:
        """`sizes`: the samples of an epoch of each source."""
        self.blend, self.sizes = blend, np.array(sizes)
        self._seeds = np.array([seed & order.WORD] if len(sizes) == 1 else [_seed_of(seed, name) for name in blend.names], np.uint64)
        self._span = lru_cache(KEPT_BLOCKS)(self._locate_span)

    def locate(self, samples: np.ndarray) -> Located:
        """The places of samples, by their numbers in the run, in any shape."""
        spans, places = np.divmod(samples, SPAN)
        found = Located(*(np.empty(samples.shape, np.int64) for _ in Located._fields))
        for span in np.unique(spans).tolist():
            here = spans == span
            for values, part in zip(found, self._span(span), strict=True):
                values[here] = part[places[here]]
        return found

    def consecutive(self, samples: np.ndarray) -> Located:
        """`locate` of consecutive samples: a slice of their span, without a copy, unless they lie in two."""
        span, first = divmod(int(samples[0]), SPAN)
        if first + len(samples) > SPAN:
            return self.locate(samples)
        return Located(*(part[first : first + len(samples)] for part in self._span(span)))

    def epochs(self, samples: int) -> np.ndarray:
        """'sources': the number of passes through each source that the first `samples` samples of the run make."""
        return self.blend.before(samples) / self.sizes

    def _locate_span(self, span: int) -> Located:
        """`locate` of the samples of one span, together: order.sample takes a millisecond even for one."""
        place = self.blend.place(np.arange(span * SPAN, (span + 1) * SPAN))
        sizes = self.sizes[place.sources]
        windows = order.sample(place.numbers, sizes, self._seeds[place.sources])
        return Located(place.sources, windows, place.numbers // sizes)


def _seed_of(seed: int, name: str) -> int:
    """A seed of its own for a source, which depends on nothing but the run's seed and the source's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little")
