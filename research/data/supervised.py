"""Supervised examples: whole conversations packed into samples, in which the loss counts on responses, or on all tokens."""

from typing import Literal

import numpy as np

from parallel.errors import Mistake
from research.data.examples import Rows
from research.data.mask_store import TokenMask
from research.data.packing import best_fit, ranges
from research.data.token_store import TokenStore
from research.data.tokenizer import Tokenizer


class SupervisedExamples:
    """Samples are bins of whole examples: the documents of a store that `prepare --supervised` has made.

    An example of n tokens takes n - 1 places: each but its first token is predicted from those before it. Nothing stands in front of it,
    as nothing does in a server. An example that has no room in a sample is truncated at its end. If no token that counts is left of it, it
    is left out, as one is that has a single token. What is left of a row does not count.
    """

    confines = True

    def __init__(
        self, store: TokenStore, tokenizer: Tokenizer, seq_length: int, seed: int, train_on: Literal["responses", "all"] = "responses"
    ) -> None:
        self.store, self.seq_length, self.end_of_text, self.train_on = store, seq_length, tokenizer.end_of_text, train_on
        self._mask = TokenMask(store).values
        offsets = store.document_offsets()
        needed = np.maximum(np.diff(offsets) - 1, 0)
        places = np.minimum(needed, seq_length)
        counted = places if train_on == "all" else self._responses(offsets[:-1], places)
        kept = np.flatnonzero(counted)
        if not len(kept):
            raise Mistake(
                f"none of the {store.num_documents:,} examples of {store.prefix.name} has a token of a response among its first "
                f"model.seq_length + 1 = {seq_length + 1} tokens → use a larger model.seq_length, or examples with shorter prompts"
            )
        bins = best_fit(places[kept], seq_length)
        documents = kept[bins.items]
        self._used, self._counted = (np.add.reduceat(values[documents], bins.starts[:-1]) for values in (places, counted))
        self.size = len(bins.starts) - 1

        # what lies in the samples, one after the other: the examples of each, and last the places that are left, as one more piece
        ends = bins.starts[1:]
        self._begins = np.insert(offsets[documents], ends, 0)
        self._lengths = np.insert(places[documents], ends, seq_length - self._used)
        self._starts = bins.starts + np.arange(self.size + 1)
        self.num_truncated = int(np.count_nonzero(needed > seq_length))
        """The examples that are longer than a sample, those that are left out included."""
        self.num_left_out = store.num_documents - len(kept)

    def _responses(self, begins: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The tokens of responses among the targets of each document, which are the `places` tokens behind its first one."""
        found = np.zeros(len(begins), np.int64)
        step = max(1, 2**24 // self.seq_length)
        for first in range(0, len(begins), step):
            here = slice(first, first + step)
            tokens = ranges(begins[here] + 1, places[here])
            documents = np.repeat(np.arange(len(places[here])), places[here])
            found[here] = np.bincount(documents, self._mask[tokens], len(places[here]))
        return found

    @property
    def fill(self) -> float:
        """The share of the places of all samples that hold a token."""
        return float(self._used.sum() / (self.size * self.seq_length))

    @property
    def summary(self) -> str:
        """What an epoch holds and what is missing in it, for the beginning of a run."""
        counted = "tokens of responses" if self.train_on == "responses" else "tokens"
        words = [
            f"{self.store.num_documents:,} examples in {self.size:,} samples, {100 * self.fill:.1f} % of their places used",
            f"{int(self._counted.sum()):,} {counted} count",
        ]
        if self.num_truncated:
            words.append(f"{self.num_truncated:,} longer than model.seq_length + 1 = {self.seq_length + 1} tokens, truncated at the end")
        if self.num_left_out:
            words.append(f"{self.num_left_out:,} left out, because no token that counts is within that length")
        return " · ".join(words)

    def rows(self, numbers: np.ndarray, epochs: np.ndarray) -> Rows:
        """As in Examples: the same in every epoch."""
        first = self._starts[numbers]
        sizes = self._starts[numbers + 1] - first  # pieces of each row
        pieces = ranges(first, sizes)
        lengths = self._lengths[pieces]
        tokens = ranges(self._begins[pieces], lengths).reshape(len(numbers), self.seq_length)
        ids = self.store.tokens.take(tokens, mode="clip").astype(np.int64)
        tokens += 1
        targets = self.store.tokens.take(tokens, mode="clip").astype(np.int64)
        counts = np.ones(tokens.shape, bool) if self.train_on == "all" else self._mask.take(tokens, mode="clip").view(bool)
        segments = np.repeat(pieces - np.repeat(first, sizes), lengths).reshape(tokens.shape)
        for row, used in enumerate(self._used[numbers].tolist()):
            ids[row, used:], targets[row, used:], counts[row, used:], segments[row, used:] = self.end_of_text, 0, False, -1
        return Rows(ids, targets, counts, segments)

    def counted(self, numbers: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """As in Examples: the tokens of responses, or all, of the bin's examples."""
        return self._counted[numbers]

    def stretches(self, number: int, epoch: int) -> list[tuple[int, int]]:
        """As in Examples: the examples of the bin, as far as they are not truncated."""
        here = slice(self._starts[number], self._starts[number + 1] - 1)
        return [
            (begin, begin + length + 1) for begin, length in zip(self._begins[here].tolist(), self._lengths[here].tolist(), strict=True)
        ]
