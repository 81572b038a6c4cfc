"""Blending: which source each sample of a run comes from, and how many of that source came before it. Nothing is stored.

Samples are counted in blocks of BLOCK. Each block holds the same number of samples of a source, its weight times BLOCK rounded by the
largest remainder, in an order that a Feistel permutation of the block gives (order.py). Within a source the samples follow one another
without a gap, also where the weights change.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from parallel.errors import Mistake
from research.data import order

BLOCK = 2048
"""Samples of a block. A source with a smaller share than one sample of a block is refused."""
KEPT_BLOCKS = 4
"""Blocks whose samples stay computed: a step lies in one or two, and the data ranks of a test take turns."""

Ints = np.ndarray


@dataclass(frozen=True)
class Stage:
    """The weights of all sources from the sample number `first` on. A weight of 0 leaves the source out."""

    first: int
    weights: tuple[float, ...]


class Place(NamedTuple):
    """Where samples come from: each sample's source, and how many samples of that source came before it. Arrays of one shape."""

    sources: Ints
    numbers: Ints


class Blend:
    """The source of every sample of a run, as a function of its number. Two blends of equal arguments are equal in everything."""

    def __init__(self, names: Sequence[str], stages: Sequence[Stage], seed: int) -> None:
        """The first stage begins at sample 0. Raises a Mistake that names the source if weights do not work."""
        self.names, self.seed = tuple(names), seed
        self.firsts = [stage.first for stage in stages]
        if self.firsts[:1] != [0] or any(a >= b for a, b in pairwise(self.firsts)):
            raise ValueError(f"stages begin at samples {self.firsts}: the first at 0, and each later than the one before")
        self.counts = [apportioned(self.names, stage.weights, BLOCK) for stage in stages]
        """'sources' for each stage: the samples of each source in a whole block."""
        self._offsets = [np.zeros(len(names), np.int64)]
        """'sources' for each stage: the samples of each source before it."""
        for stage, (first, end) in enumerate(pairwise(self.firsts)):
            self._offsets.append(self._offsets[-1] + self._taken(stage, end - first))
        self._block = lru_cache(KEPT_BLOCKS)(self._computed)

    def place(self, numbers: Ints) -> Place:
        """The places of the samples `numbers`, in any order and shape."""
        found = Place(np.empty(numbers.shape, np.int64), np.empty(numbers.shape, np.int64))
        stages = np.searchsorted(self.firsts, numbers, side="right") - 1
        for stage in np.unique(stages).tolist():
            blocks, places = np.divmod(numbers - self.firsts[stage], BLOCK)
            for block in np.unique(blocks[stages == stage]).tolist():
                here = (stages == stage) & (blocks == block)
                block_sources, ranks = self._block(stage, block)
                sources = block_sources[places[here]]
                found.sources[here] = sources
                found.numbers[here] = self._offsets[stage][sources] + self.counts[stage][sources] * block + ranks[places[here]]
        return found

    def before(self, number: int) -> Ints:
        """'sources': the samples of each source among the first `number` samples of the run."""
        stage = int(np.searchsorted(self.firsts, number, side="right")) - 1
        return self._offsets[stage] + self._taken(stage, number - self.firsts[stage])

    def _taken(self, stage: int, length: int) -> Ints:
        """'sources': the samples of each source among the first `length` samples of a stage."""
        blocks, rest = divmod(length, BLOCK)
        sources, _ = self._computed(stage, blocks)
        return self.counts[stage] * blocks + np.bincount(sources[:rest], minlength=len(self.names))

    def _computed(self, stage: int, block: int) -> tuple[Ints, Ints]:
        """'BLOCK' each: the source of each sample of a block, and how many of its source came before it in the block."""
        if len(self.names) == 1:
            return np.zeros(BLOCK, np.int64), np.arange(BLOCK)
        slots = order.sample(np.arange(block * BLOCK, (block + 1) * BLOCK), BLOCK, self.seed + stage)
        ends = np.cumsum(self.counts[stage])
        sources = np.searchsorted(ends, slots, side="right")
        by_source = np.argsort(sources, kind="stable")
        ranks = np.empty(BLOCK, np.int64)
        ranks[by_source] = np.arange(BLOCK) - (ends - self.counts[stage])[sources[by_source]]
        return sources, ranks


def apportioned(names: Sequence[str], weights: Sequence[float], total: int) -> Ints:
    """'sources': `total` divided in proportion to the weights, by the largest remainder; of equal remainders the first."""
    if len(weights) != len(names):
        raise ValueError(f"{len(weights)} weights for {len(names)} sources")
    for name, weight in zip(names, weights, strict=True):
        if not 0 <= weight < float("inf"):
            raise Mistake(f"the weight {weight} of {name!r} is no weight → use 0 or more, such as 0.7")
    shares = [Fraction(weight) for weight in weights]
    if not sum(shares):
        raise Mistake(f"the weights of all {len(names)} sources are 0 → give one of them a weight")
    quotas = [share * total / sum(shares) for share in shares]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(names)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    for name, share, count in zip(names, shares, counts, strict=True):
        if share and not count:
            least = float(sum(shares) / total)
            raise Mistake(
                f"the weight {float(share):g} of {name!r} is less than one sample of {total:,}, which is {least:.2g} with these weights "
                "→ give it more, or leave it out"
            )
    return np.array(counts, np.int64)
