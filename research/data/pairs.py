"""Pairs packed into samples: for an encoder–decoder (PairExamples), and joined for a decoder-only model (JoinedPairs).

A document of the store is source tokens, separator, target tokens, end-of-text (pair_inputs.py). Both classes learn the same targets: the
target's tokens and end-of-text, each predicted from the separator, the target's tokens before it, and the source.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from parallel.errors import Mistake
from research.data.examples import Rows
from research.data.packing import Bins, best_fit, best_fit_of_two, ranges
from research.data.pair_inputs import separator_of
from research.data.special_tokens import SEPARATOR
from research.data.token_store import TokenStore
from research.data.tokenizer import Tokenizer

AT_ONCE = 1 << 24
"""Tokens that are searched for separators at a time."""


class StoredPairs(NamedTuple):
    """Where the pairs of a store lie in its tokens. Arrays 'n' int64 in the store's order."""

    begins: np.ndarray
    """The first token of the source."""
    separators: np.ndarray
    ends: np.ndarray
    """Behind end-of-text."""

    @property
    def sources(self) -> np.ndarray:
        """The tokens of each source, separator included."""
        return self.separators - self.begins + 1

    @property
    def targets(self) -> np.ndarray:
        """The tokens of each target, end-of-text included."""
        return self.ends - 1 - self.separators

    @property
    def joined(self) -> np.ndarray:
        """The places of each in a row of a decoder-only model: all tokens but the last are read."""
        return self.ends - self.begins - 1

    def take(self, which: np.ndarray) -> "StoredPairs":
        """Some of them, in this order."""
        return StoredPairs(*(column[which] for column in self))


def pairs_of(store: TokenStore, tokenizer: Tokenizer, separator: str) -> StoredPairs:
    """All documents of the store. A Mistake if one of them is no pair."""
    number, offsets = separator_of(tokenizer, separator), store.document_offsets()
    begins, ends = offsets[:-1], offsets[1:]
    steps = range(0, store.num_tokens, AT_ONCE)
    found = np.concatenate([first + np.flatnonzero(store.tokens[first : first + AT_ONCE] == number) for first in steps])
    found = np.append(found, store.num_tokens)
    separators = found[np.searchsorted(found, begins)]  # the first one of each document, or of a later one
    is_pair = (separators > begins) & (separators + 1 < ends)
    is_pair[is_pair] = store.tokens[ends[is_pair] - 1] == tokenizer.end_of_text
    if not is_pair.all():
        raise Mistake(
            f"{np.count_nonzero(~is_pair):,} of the {len(ends):,} documents of {store.prefix.name} are not a source, {separator}, a target "
            'and end-of-text → use a .jsonl with lines of "source" and "target", or python -m research prepare … --pairs'
        )
    return StoredPairs(begins, separators, ends)


class PackedStretches:
    """Stretches of a store, several in a row of `width` places: row i has those of bin i, one after the other."""

    def __init__(self, starts: np.ndarray, lengths: np.ndarray, firsts: np.ndarray, width: int) -> None:
        """starts, lengths: of all rows one after the other. firsts: 'rows + 1', where those of each row begin."""
        self._starts, self._lengths, self._firsts, self.width = starts, lengths, firsts, width
        self.used: np.ndarray = np.add.reduceat(lengths, firsts[:-1])
        """'rows': the places of each row that hold a token."""

    @property
    def fill(self) -> float:
        """The share of the places of all rows that hold a token."""
        return float(self.used.sum() / (len(self.used) * self.width))

    def places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """'b width' int64: for each place of these rows its token's number in the store, and its stretch's number in the row; or −1."""
        firsts = self._firsts[numbers]
        sizes = self._firsts[numbers + 1] - firsts
        stretches = ranges(firsts, sizes)
        lengths = self._lengths[stretches]
        where = ranges(np.arange(len(numbers)) * self.width, self.used[numbers])
        tokens, segments = np.full((2, len(numbers), self.width), -1, np.int64)
        tokens.flat[where] = ranges(self._starts[stretches], lengths)
        segments.flat[where] = np.repeat(ranges(np.zeros_like(sizes), sizes), lengths)
        return tokens, segments


class _PackedPairs:
    """What both classes share. Pairs that have room in a sample are packed into bins; the others are left out and counted."""

    confines = True

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, separator: str) -> None:
        self.store, self.end_of_text = store, tokenizer.end_of_text
        self._all = pairs_of(store, tokenizer, separator)

    def _pack(self, has_room: np.ndarray, room: str, bins_of: Callable[[StoredPairs], Bins]) -> None:
        """has_room: of each pair of the store. `room`: for messages, how long a pair may be."""
        kept = self._all.take(np.flatnonzero(has_room))
        if not len(kept.begins):
            raise Mistake(f"none of the {len(has_room):,} pairs of {self.store.prefix.name} has room in {room} → use larger lengths")
        bins = bins_of(kept)
        self._pairs, self._firsts, self.size = kept.take(bins.items), bins.starts, len(bins.starts) - 1
        self._counted = np.add.reduceat(self._pairs.targets, bins.starts[:-1])
        self.num_left_out = int(np.count_nonzero(~has_room))
        """The pairs without room in a sample."""

    def _rows(self, packed: PackedStretches, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """'b width' each: the places' tokens, the tokens behind these, the places' numbers in the store or −1, and the segments."""
        places, segments = packed.places(numbers)
        ids, targets = (self.store.tokens.take(places + shift, mode="clip").astype(np.int64) for shift in (0, 1))
        ids[places < 0], targets[places < 0] = self.end_of_text, 0
        return ids, targets, places, segments

    def counted(self, numbers: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """As in Examples: the tokens of the targets, end-of-text included."""
        return self._counted[numbers]

    def stretches(self, number: int, epoch: int) -> list[tuple[int, int]]:
        """As in Examples: the pairs of the bin."""
        here = slice(self._firsts[number], self._firsts[number + 1])
        return list(zip(self._pairs.begins[here].tolist(), self._pairs.ends[here].tolist(), strict=True))

    def _summary(self, used: str, longer: list[str]) -> str:
        words = [
            f"{len(self._all.begins):,} pairs in {self.size:,} samples, {used}",
            f"{int(self._counted.sum()):,} tokens of targets count",
        ]
        if self.num_left_out:
            words.append(f"{self.num_left_out:,} pairs left out: {' and '.join(longer)}")
        return " · ".join(words)


class PairExamples(_PackedPairs):
    """Samples of an encoder–decoder: [sources, each with its separator | what the decoder reads], packed by both lengths at once.

    For each pair the decoder reads the separator and the target, and predicts the target and end-of-text. Both sides of a pair have its
    number as their segment. What is left of a part holds padding in segment −1.
    """

    def __init__(
        self, store: TokenStore, tokenizer: Tokenizer, seq_length: int, seed: int, *, source_length: int, separator: str = SEPARATOR
    ) -> None:
        super().__init__(store, tokenizer, separator)
        self._lengths = (source_length, seq_length)
        fits = (self._all.sources <= source_length) & (self._all.targets <= seq_length)
        room = f"model.source_length = {source_length} and model.seq_length = {seq_length} tokens"
        self._pack(fits, room, lambda pairs: best_fit_of_two(pairs.sources, pairs.targets, source_length, seq_length))
        self._source = PackedStretches(self._pairs.begins, self._pairs.sources, self._firsts, source_length)
        self._target = PackedStretches(self._pairs.separators, self._pairs.targets, self._firsts, seq_length)

    def rows(self, numbers: np.ndarray, epochs: np.ndarray) -> Rows:
        """As in Examples: the same in every epoch. ids and segments are 'b (source_length + seq_length)', the others 'b seq_length'."""
        source, _, _, source_segments = self._rows(self._source, numbers)
        read, targets, places, segments = self._rows(self._target, numbers)
        both = np.concatenate([source, read], axis=1), np.concatenate([source_segments, segments], axis=1)
        return Rows(both[0], targets, places >= 0, both[1])

    @property
    def summary(self) -> str:
        """What an epoch holds and what is missing in it, for the beginning of a run."""
        longer = [
            f"{count:,} with a {name} of more than {limit} tokens"
            for name, lengths, limit in zip(("source", "target"), (self._all.sources, self._all.targets), self._lengths, strict=True)
            if (count := np.count_nonzero(lengths > limit))
        ]
        used = f"{100 * self._source.fill:.1f} % of the sources' places used, {100 * self._target.fill:.1f} % of the targets'"
        return self._summary(used, longer)


class JoinedPairs(_PackedPairs):
    """Samples of a decoder-only model: whole documents packed into rows, in which the loss counts on targets and end-of-text.

    A pair of n tokens takes n − 1 places: each token but the first is predicted from those before it.
    """

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, seq_length: int, seed: int, *, separator: str = SEPARATOR) -> None:
        super().__init__(store, tokenizer, separator)
        self.seq_length = seq_length
        room = f"model.seq_length + 1 = {seq_length + 1} tokens"
        self._pack(self._all.joined <= seq_length, room, lambda pairs: best_fit(pairs.joined, seq_length))
        self._packed = PackedStretches(self._pairs.begins, self._pairs.joined, self._firsts, seq_length)

    def rows(self, numbers: np.ndarray, epochs: np.ndarray) -> Rows:
        """As in Examples: the same in every epoch."""
        ids, targets, places, segments = self._rows(self._packed, numbers)
        pair = self._firsts[numbers][:, None] + segments
        return Rows(ids, targets, (segments >= 0) & (places >= self._pairs.separators[pair]), segments)

    @property
    def summary(self) -> str:
        """As of PairExamples."""
        longer = [f"longer than model.seq_length + 1 = {self.seq_length + 1} tokens"]
        return self._summary(f"{100 * self._packed.fill:.1f} % of their places used", longer)
