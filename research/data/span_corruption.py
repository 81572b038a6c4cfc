"""Span corruption (T5, arXiv:1910.10683, section 3.1.4): spans of the text are replaced by sentinels, and predicted after them."""

from typing import NamedTuple

import numpy as np

from parallel.errors import Mistake
from research.data.draws import random_keys, smallest
from research.data.examples import Rows
from research.data.masked_lm import whole_windows
from research.data.token_store import TokenStore
from research.data.tokenizer import Tokenizer


class SpanLengths(NamedTuple):
    """How many tokens a sample has. They are the same for all samples."""

    tokens: int
    """Of the window that a sample is made from."""
    noise: int
    """Of those that are replaced."""
    spans: int
    source: int
    """Tokens that are kept, a sentinel for each span, and end-of-text."""
    target: int
    """For each span its sentinel and its tokens, and end-of-text."""


class SpanPairs(NamedTuple):
    """What an encoder reads, and what a decoder predicts."""

    source: np.ndarray  # b source, int64
    target: np.ndarray  # b target, int64


class SpanExamples:
    """Sample i is made from the window tokens[i*n : i*n + n], where n is the longest whose source fits into source_length.

    It begins with tokens that are kept; then spans and kept tokens take turns. Every division of the replaced tokens into spans, and of the
    others into the runs between them, is as likely, none of them empty, as in T5's `random_spans_noise_mask`.
    """

    confines = True

    def __init__(
        self,
        store: TokenStore,
        tokenizer: Tokenizer,
        seq_length: int,
        seed: int,
        *,
        source_length: int,
        rate: float,
        mean_length: float,
        sentinels: str,
        start_token: int | None = None,
    ) -> None:
        """`start_token`: what the decoder begins with; None: end-of-text."""
        self.store, self.seed, self.end_of_text = store, seed, tokenizer.end_of_text
        self.start_token = tokenizer.end_of_text if start_token is None else start_token
        self.source_length, self.seq_length = source_length, seq_length
        self.lengths = lengths_of(source_length, rate, mean_length)
        if self.lengths.target > seq_length:
            raise Mistake(
                f"the target of a source of model.source_length = {source_length} tokens has {self.lengths.target}, more than "
                f"model.seq_length = {seq_length} → use model.seq_length {self.lengths.target}, or a shorter source"
            )
        names = [sentinels.replace("{}", str(number)) for number in range(self.lengths.spans)]
        found = [tokenizer.backend.token_to_id(name) for name in names]
        missing = next(
            (name for name, number in zip(names, found, strict=True) if number is None or number in tokenizer.encode(name)), None
        )
        if missing:
            raise Mistake(
                f"a source of {source_length} tokens has {self.lengths.spans} spans, and the tokenizer {tokenizer.name} has no special "
                f"token {missing!r:.60} → use one that is made with it, such as builtin:bpe-8192+spans, longer spans or a shorter sequence"
            )
        self.sentinels = np.array(found, np.int64)
        self.size = whole_windows(store, self.lengths.tokens)
        self._windows = store.tokens[: self.size * self.lengths.tokens].reshape(self.size, self.lengths.tokens)

    def pairs(self, numbers: np.ndarray, epochs: np.ndarray) -> SpanPairs:
        """The source and the target of each sample."""
        n = self.lengths.tokens
        tokens = self._windows[numbers].astype(np.int64)
        is_noise = self._noise(numbers, epochs)
        begins = is_noise & ~np.roll(is_noise, 1, axis=1)  # the first token of a sample is kept, the last one is replaced
        places = np.zeros((len(tokens), 2 * n), np.int64)  # of each token, and in front of it of a sentinel
        places[:, 1::2] = tokens
        places[:, ::2][begins] = np.tile(self.sentinels, len(tokens))

        def taken(which: np.ndarray) -> np.ndarray:
            """The sentinels, the tokens of `which`, and end-of-text."""
            chosen = np.stack([begins, which], axis=2).reshape(places.shape)
            row = places[chosen].reshape(len(tokens), -1)
            return np.append(row, np.full((len(tokens), 1), self.end_of_text), axis=1)

        return SpanPairs(taken(~is_noise), taken(is_noise))

    def rows(self, numbers: np.ndarray, epochs: np.ndarray) -> Rows:
        """As in Examples: [source | start token and the target without its last], each part filled up with padding in segment −1."""
        source, target = self.pairs(numbers, epochs)
        shifted = np.roll(target, 1, axis=1)
        shifted[:, 0] = self.start_token
        widths = (self.source_length, self.seq_length)
        ids = [_filled(part, width, self.end_of_text) for part, width in zip((source, shifted), widths, strict=True)]
        segments = [_filled(np.zeros_like(part), width, -1) for part, width in zip((source, shifted), widths, strict=True)]
        return Rows(np.concatenate(ids, 1), _filled(target, self.seq_length, 0), segments[1] == 0, np.concatenate(segments, 1))

    def counted(self, numbers: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """As in Examples: the target."""
        return np.full(len(numbers), self.lengths.target, np.int64)

    def stretches(self, number: int, epoch: int) -> list[tuple[int, int]]:
        """As in Examples: the window."""
        return [(number * self.lengths.tokens, (number + 1) * self.lengths.tokens)]

    def _noise(self, numbers: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """'b tokens' bool: what is replaced."""
        kept, noise, spans = self.lengths.tokens - self.lengths.noise, self.lengths.noise, self.lengths.spans
        words = random_keys(self.seed, epochs, numbers, count=kept + noise - 2)
        runs = np.stack([_divided(words[:, : kept - 1], kept, spans), _divided(words[:, kept - 1 :], noise, spans)], axis=2)
        borders = np.cumsum(runs.reshape(len(numbers), -1), axis=1)[:, :-1]
        changes = np.zeros((len(numbers), self.lengths.tokens), bool)
        np.put_along_axis(changes, borders, True, 1)
        return np.cumsum(changes, axis=1) % 2 == 1


def _filled(part: np.ndarray, width: int, value: int) -> np.ndarray:
    """'b width': the part, and `value` behind it."""
    return np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=value)


def _divided(words: np.ndarray, items: int, runs: int) -> np.ndarray:
    """'b runs': lengths of at least 1 with the sum `items`; every division is as likely. words: 'b items-1', random."""
    cuts = smallest(words, runs - 1) + 1
    return np.diff(cuts, axis=1, prepend=0, append=items)


def lengths_of(source: int, rate: float, mean_length: float) -> SpanLengths:
    """The lengths of the samples whose source has `source` tokens. A Mistake if it is too short for one.

    The arithmetic of T5's `random_spans_helper` and `random_spans_noise_mask`: of n tokens, n · rate, rounded and in [1, n − 1], are
    replaced, in as many spans as that is times the mean length, rounded and at least 1; n is the largest whose source fits.
    """

    def of(tokens: int) -> SpanLengths:
        noise = min(max(round(tokens * rate), 1), tokens - 1)
        spans = min(max(round(noise / mean_length), 1), noise, tokens - noise)
        return SpanLengths(tokens, noise, spans, tokens - noise + spans + 1, noise + spans + 1)

    if source < of(2).source:
        raise Mistake(f"model.source_length = {source} has no room for a span, its sentinel and end-of-text → use {of(2).source} or more")
    low, high = 2, 3
    while of(high).source <= source:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of(middle).source <= source else (low, middle)
    return of(low)
