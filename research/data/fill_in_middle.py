"""Fill in the middle (arXiv:2207.14255): documents that are cut at two characters and rearranged, so that the middle comes last."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from parallel.errors import Mistake
from research.data.batches import num_samples
from research.data.confined import refuse_without_ends, segments
from research.data.draws import random_words, uniform
from research.data.examples import Rows
from research.data.part_tokens import PartTokens
from research.data.token_store import TokenStore
from research.data.tokenizer import Tokenizer

PROBE = ("a b", " c\nd", "e", "é ")
GROWTH = 5
"""Tokens that a rearranged piece has more than before, as a rule: three sentinels, and one for each token that is cut in two."""
LEAST_SLACK = 6


class Sentinels(NamedTuple):
    """The ids of the tokens in front of the three parts of a document."""

    prefix: int
    suffix: int
    middle: int

    def prompt(self, prefix: Sequence[int], suffix: Sequence[int]) -> tuple[int, ...]:
        """The ids after which a model writes the middle: PSM."""
        return (self.prefix, *prefix, self.suffix, *suffix, self.middle)


class SuffixFirst(Sentinels):
    """Those of a model that has mostly read the suffix first."""

    __slots__ = ()

    def prompt(self, prefix: Sequence[int], suffix: Sequence[int]) -> tuple[int, ...]:
        """The ids after which a model writes the middle: SPM. The prefix stands directly in front of it."""
        return (self.prefix, self.suffix, *suffix, self.middle, *prefix)


def sentinels_of(tokenizer: Tokenizer, prefix: str, suffix: str, middle: str) -> Sentinels:
    """The ids of three tokens. A Mistake if the tokenizer lacks one, or reads its letters in a text as the token."""
    names = {"prefix": prefix, "suffix": suffix, "middle": middle}
    found = {key: number for key, name in names.items() if (number := tokenizer.backend.token_to_id(name)) is not None}
    lacking = [key for key in names if key not in found]
    if lacking:
        settings = ", ".join(f"{key} = {names[key]!r:.60}" for key in lacking)
        raise Mistake(
            f"the tokenizer {tokenizer.name} has no token {', '.join(names[key] for key in lacking):.120} → name tokens that it has "
            f"({settings}), or use one that is made with them, such as builtin:bpe-8192+fim"
        )
    for key, name in names.items():
        if found[key] in tokenizer.encode(f"a{name} b"):
            raise Mistake(
                f"the tokenizer {tokenizer.name} reads the letters {name!r:.60} in a text as its token → use a tokenizer in which this "
                "token is special, such as builtin:bpe-8192+fim"
            )
    return Sentinels(**found)


class FillInMiddleExamples:
    """Sample i begins with the window tokens[i*w : i*w + w + 1], w = seq_length − slack, and has seq_length + 1 tokens.

    The documents, or pieces of documents, in the window are rearranged with probability `rate`. Two of the n + 1 places between the n
    characters of a piece are drawn; they cut it into prefix, middle and suffix, which are encoded separately:

        PSM  <prefix> prefix <suffix> suffix <middle> middle
        SPM  <prefix> <suffix> suffix <middle> prefix middle      (variant 2 of the paper, with probability `spm_rate`)

    That makes it longer. From left to right, pieces are rearranged only while all that they have grown is at most `slack`, and the tokens
    that follow the window fill the row, as they are. So every row is full and every target counts, at the price of reading less than
    `slack` tokens of each window twice. The end-of-text in front of a document stays in front of it, and a rearranged piece is always
    followed by one: where the window cuts the document, one is inserted. A piece stays as it is if its tokens are not those of a whole
    text, as when it begins inside of a character.
    """

    def __init__(
        self,
        store: TokenStore,
        tokenizer: Tokenizer,
        seq_length: int,
        seed: int,
        *,
        rate: float,
        spm_rate: float,
        prefix: str,
        suffix: str,
        middle: str,
        confine: bool,
    ) -> None:
        refuse_without_ends(store, tokenizer)
        self.sentinels = sentinels_of(tokenizer, prefix, suffix, middle)
        encoded = [token for text in PROBE for token in tokenizer.encode(text)] if tokenizer.cuts is False else []
        if encoded and tokenizer.decode(encoded) != "".join(PROBE):
            raise Mistake(
                f"the tokenizer {tokenizer.name} does not keep a text that is encoded in parts, so no document can be rearranged → use a "
                "byte-level one, such as builtin:bpe-8192+fim"
            )
        self.store, self.tokenizer, self.seq_length, self.seed = store, tokenizer, seq_length, seed
        self.rate, self.spm_rate, self.confines = rate, spm_rate, confine
        longest = num_samples(store, seq_length)  # refuses a store that is too short
        self.slack = slack_of(rate, seq_length, store.num_tokens / store.num_documents) if longest and rate else 0
        self.stride = seq_length - self.slack
        self.size = (store.num_tokens - 1 - self.slack) // self.stride
        self._cutter = PartTokens(tokenizer)

    def rows(self, numbers: np.ndarray, epochs: np.ndarray) -> Rows:
        """As in Examples."""
        tokens, _ = self._made(numbers, epochs)
        ids = tokens[:, :-1]
        return Rows(ids, tokens[:, 1:], None, segments(ids, self.tokenizer.end_of_text) if self.confines else None)

    def counted(self, numbers: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """As in Examples: all."""
        return np.full(len(numbers), self.seq_length, np.int64)

    def stretches(self, number: int, epoch: int) -> list[tuple[int, int]]:
        """As in Examples: the window and what fills the row."""
        _, (stop,) = self._made(np.array([number]), np.array([epoch]))
        return [(number * self.stride, number * self.stride + stop)]

    def _made(self, numbers: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """('b s+1', how many tokens of the store were read for each of these samples)."""
        starts = numbers * self.stride
        rows = np.stack([self.store.tokens[start : start + self.seq_length + 1] for start in starts.tolist()]).astype(np.int64)
        stops = [self.seq_length + 1] * len(rows)
        if not self.slack:
            return rows, stops
        by_row: dict[int, list[tuple[int, int, np.ndarray]]] = {}
        for row, first, last, tokens in self._rearranged(rows[:, : self.stride + 1], starts, epochs):
            by_row.setdefault(row, []).append((first, last, tokens))
        for row, found in by_row.items():
            rows[row], stops[row] = self._row(rows[row], found)
        return rows, stops

    def _row(self, read: np.ndarray, found: list[tuple[int, int, np.ndarray]]) -> tuple[np.ndarray, int]:
        """(seq_length + 1 tokens, how many of `read` are among them), with those of the rearranged pieces that there is room for.

        found: (begin, end, rearranged tokens) of pieces of the window, in order.
        """
        window, left, parts, done = self.stride + 1, self.slack, [], 0
        for first, last, piece in found:
            if last == window and read[last] != self.tokenizer.end_of_text:  # the document goes on behind the window
                piece = np.append(piece, self.tokenizer.end_of_text)
            if 0 <= len(piece) - (last - first) <= left:
                left -= len(piece) - (last - first)
                parts += [read[done:first], piece]
                done = last
        return np.concatenate([*parts, read[done : window + left]]), window + left

    def _rearranged(self, windows: np.ndarray, starts: np.ndarray, epochs: np.ndarray) -> list[tuple[int, int, int, np.ndarray]]:
        """(row, begin, end, rearranged tokens) of each piece of a document that is drawn, without its end-of-text. windows: 'b w+1'.

        What is drawn depends on the seed, the epoch, and the place of the piece in the store, which tells both its document and its window.
        """
        is_text = windows != self.tokenizer.end_of_text
        edge = np.zeros((len(windows), 1), bool)
        row, first = np.nonzero(is_text & ~np.hstack([edge, is_text[:, :-1]]))
        _, last = np.nonzero(is_text & ~np.hstack([is_text[:, 1:], edge]))
        drawn = random_words(self.seed, epochs[row], starts[row] + first, count=4)
        share = uniform(drawn[:, :2])

        places, parts, is_spm = [], [], []
        for i in np.flatnonzero(share[:, 0] < self.rate).tolist():
            place = (int(row[i]), int(first[i]), int(last[i]) + 1)
            ids = windows[place[0], place[1] : place[2]]
            if text := self._cutter.text(ids):
                places.append(place)
                parts += self._cutter.parts(ids, text, *sorted(int(word) % (len(text) + 1) for word in drawn[i, 2:]))
                is_spm.append(share[i, 1] < self.spm_rate)
        encoded = self._cutter.encoded(parts)
        return [(*place, self._joined(encoded[3 * i : 3 * i + 3], is_spm[i])) for i, place in enumerate(places)]

    def _joined(self, parts: list[np.ndarray], is_spm: bool) -> np.ndarray:
        """Prefix, middle and suffix with their sentinels, the middle last."""
        prefix, middle, suffix = parts
        before_prefix, before_suffix, before_middle = ([number] for number in self.sentinels)
        if is_spm:
            return np.concatenate([before_prefix, before_suffix, suffix, before_middle, prefix, middle])
        return np.concatenate([before_prefix, prefix, before_suffix, suffix, before_middle, middle])


def slack_of(rate: float, seq_length: int, document_length: float) -> int:
    """Tokens that the pieces of a window may grow by: room for three standard deviations more pieces than are expected, if their number
    is a Poisson variable, but at most a quarter of the sequence. A Mistake if a sequence has no room for one."""
    pieces = rate * (1 + seq_length / document_length)
    slack = min(math.ceil(GROWTH * (pieces + 3 * math.sqrt(pieces))), seq_length // 4)
    if slack < LEAST_SLACK:
        raise Mistake(
            f"model.seq_length = {seq_length} has no room for sentinels: a quarter of it may be added → use {4 * LEAST_SLACK} or more, or "
            "data.examples = 'stream'"
        )
    return slack
