"""Windows of a stream in which attention is confined to each document (arXiv:2407.21783, section 3.2)."""

import numpy as np

from parallel.errors import Mistake
from research.data.batches import num_samples, windows_of
from research.data.examples import Rows
from research.data.token_store import TokenStore
from research.data.tokenizer import Tokenizer


class ConfinedStream:
    """Sample i is the window tokens[i*s : i*s + s + 1], as in StreamSampler, divided into segments at its documents.

    The end-of-text before a document is its beginning: it is what the document's first token is predicted from. So every token but the
    very first of the store is predicted once in an epoch, and only from tokens of its own document and that end-of-text. A document that
    a window cuts is a document of its own in the next one.
    """

    confines = True

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, seq_length: int, seed: int) -> None:
        refuse_without_ends(store, tokenizer)
        self.store, self.seq_length, self.end_of_text = store, seq_length, tokenizer.end_of_text
        self.size = num_samples(store, seq_length)
        self._windows = windows_of(store.tokens, seq_length)

    def rows(self, numbers: np.ndarray, epochs: np.ndarray) -> Rows:
        """As in Examples: the same in every epoch."""
        tokens = self._windows[numbers].astype(np.int64)
        return Rows(tokens[:, :-1], tokens[:, 1:], None, segments(tokens[:, :-1], self.end_of_text))

    def counted(self, numbers: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """As in Examples: all."""
        return np.full(len(numbers), self.seq_length, np.int64)

    def stretches(self, number: int, epoch: int) -> list[tuple[int, int]]:
        """As in Examples: the window."""
        return [(number * self.seq_length, (number + 1) * self.seq_length + 1)]


def segments(ids: np.ndarray, end_of_text: int) -> np.ndarray:
    """'b s' int64: the number of each token's document in its row. An end-of-text belongs to the document behind it."""
    return np.cumsum(ids == end_of_text, axis=1, dtype=np.int64)


def refuse_without_ends(store: TokenStore, tokenizer: Tokenizer) -> None:
    """Raises a Mistake if the first document of a store does not end in end-of-text, as those of some other programs."""
    start, stop = store.document_offsets(0, 1)[:2].tolist()
    if store.num_documents > 1 and stop > start and int(store.tokens[stop - 1]) != tokenizer.end_of_text:
        raise Mistake(
            f"{store.prefix.name} has no end-of-text ({tokenizer.end_of_text}) behind its first document, so its documents cannot be told "
            "apart → prepare it with end-of-text (Megatron-LM: --append-eod), or use data.examples = 'stream'"
        )
