"""Fill in the middle (arXiv:2207.14255): documents that are cut at two characters and rearranged, so that the middle comes last."""

import math
from typing import NamedTuple

import numpy as np

from parallel.errors import Mistake
from research.data.batches import num_samples
from research.data.confined import refuse_without_ends, segments
from research.data.draws import random_words, uniform
from research.data.examples import Rows
from research.data.token_store import TokenStore
from research.data.tokenizer import Tokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
PROBE = ("a b", " c\nd", "e", "é ")
GROWTH = 5
"""Tokens that a rearranged piece has more than before, as a rule: three sentinels, and one for each token that is cut in two."""
LEAST_SLACK = 6


class Sentinels(NamedTuple):
    """The ids of the tokens in front of the three parts of a document."""

    prefix: int
    suffix: int
    middle: int


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
        added = tokenizer.backend.get_added_tokens_decoder()
        self._special = np.array(sorted(number for number, token in added.items() if token.special), np.int64)

    def rows(self, numbers: np.ndarray, epochs: np.ndarray) -> Rows:
        """As in Examples."""
        made = [self._made(number, epoch)[0] for number, epoch in zip(numbers.tolist(), epochs.tolist(), strict=True)]
        tokens = np.stack(made)
        ids = tokens[:, :-1]
        return Rows(ids, tokens[:, 1:], None, segments(ids, self.tokenizer.end_of_text) if self.confines else None)

    def counted(self, numbers: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """As in Examples: all."""
        return np.full(len(numbers), self.seq_length, np.int64)

    def stretches(self, number: int, epoch: int) -> list[tuple[int, int]]:
        """As in Examples: the window and what fills the row."""
        start = number * self.stride
        return [(start, start + self._made(number, epoch)[1])]

    def _made(self, number: int, epoch: int) -> tuple[np.ndarray, int]:
        """(the seq_length + 1 tokens of a sample, how many tokens of the store were read for it)."""
        start = number * self.stride
        read = self.store.tokens[start : start + self.seq_length + 1].astype(np.int64)
        window, left = read[: self.stride + 1], self.slack
        parts, done = [], 0
        for first, last, drawn in self._chosen(window, start, epoch):
            piece = self._rearranged(window[first:last], drawn)
            if piece is None:
                continue
            if last == len(window) and read[last] != self.tokenizer.end_of_text:  # the document goes on behind the window
                piece = np.append(piece, self.tokenizer.end_of_text)
            if 0 <= len(piece) - (last - first) <= left:
                left -= len(piece) - (last - first)
                parts += [window[done:first], piece]
                done = last
        stop = len(window) + left
        return np.concatenate([*parts, read[done:stop]]), stop

    def _chosen(self, window: np.ndarray, start: int, epoch: int) -> list[tuple[int, int, np.ndarray]]:
        """(begin, end, random words) of each piece of a document that is to be rearranged, in order, without its end-of-text.

        What is drawn depends on the seed, the epoch, and the place of the piece in the store, which tells both its document and its window.
        """
        if not self.slack:
            return []
        ends = np.flatnonzero(window == self.tokenizer.end_of_text)
        first, last = np.append(0, ends + 1), np.append(ends, len(window))
        first, last = first[last > first], last[last > first]
        drawn = random_words(self.seed, np.full(len(first), epoch), start + first, count=4)
        chosen = uniform(drawn[:, 0]) < self.rate
        return list(zip(first[chosen].tolist(), last[chosen].tolist(), drawn[chosen], strict=True))

    def _rearranged(self, ids: np.ndarray, drawn: np.ndarray) -> np.ndarray | None:
        """The tokens of a piece with the middle last; None if they are not those of a whole text."""
        text = self._text(ids)
        if not text:
            return None
        begin, end = sorted(int(word) % (len(text) + 1) for word in drawn[2:])
        prefix, middle, suffix = self.tokenizer.encode_arrays([text[:begin], text[begin:end], text[end:]])
        before_prefix, before_suffix, before_middle = ([number] for number in self.sentinels)
        if uniform(drawn[1]) < self.spm_rate:
            return np.concatenate([before_prefix, before_suffix, suffix, before_middle, prefix, middle])
        return np.concatenate([before_prefix, prefix, before_suffix, suffix, before_middle, middle])

    def _text(self, ids: np.ndarray) -> str:
        """The text of tokens; '' if a text does not have them."""
        if np.isin(ids, self._special).any():
            return ""
        text = self.tokenizer.decode(ids)
        is_whole = UNKNOWN not in text or self.tokenizer.encode(text) == ids.tolist()
        return text if is_whole else ""


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
