"""Masked language modelling (BERT, arXiv:1810.04805, section 3.1): tokens are masked, and predicted from both sides."""

import numpy as np

from parallel.errors import Mistake
from research.data.draws import random_keys, smallest
from research.data.examples import Rows
from research.data.token_store import TokenStore
from research.data.tokenizer import Tokenizer

MASKED, RANDOM = 0.8, 0.9
"""Of the tokens to be predicted, 80 % are replaced by the mask and 10 % by any token of the vocabulary. The rest stay as they are."""

LAST = np.uint32(2**31)
"""The key of what is drawn only if nothing else is left."""


SENTENCES = 0x53656E74
"""Makes the draws of sentence order independent of the masks of the same sample."""


class MaskedExamples:
    """Sample i is the window tokens[i*s : i*s + s]. The targets are these tokens; those that were drawn count.

    In each sample the same number of tokens is drawn, `rate` times the sequence's, rounded, and at least one. No end-of-text is drawn as
    long as there are enough other tokens.

    With `sentence_order`, a sample is two sentences, the halves of its window (token types 0 and 1), and every second sample on average
    has them in the wrong order, which its sentence label tells: 0 for the right order, 1 for the wrong one (arXiv:1909.11942, section 3.1).
    """

    confines = False

    def __init__(
        self,
        store: TokenStore,
        tokenizer: Tokenizer,
        seq_length: int,
        seed: int,
        *,
        rate: float,
        mask: str,
        sentence_order: bool = False,
    ) -> None:
        self.store, self.seq_length, self.seed, self.sentence_order = store, seq_length, seed, sentence_order
        self.vocab_size, self.end_of_text = tokenizer.vocab_size, tokenizer.end_of_text
        number = tokenizer.backend.token_to_id(mask)
        if number is None or number in tokenizer.encode(mask):
            raise Mistake(
                f"the tokenizer {tokenizer.name} has no special token {mask!r:.60} → name one that it has, or use one that is made with "
                "it, such as builtin:bpe-8192+mask"
            )
        self.mask = number
        self.drawn = max(1, round(rate * seq_length))
        """Tokens of each sample that are predicted."""
        self.size = whole_windows(store, seq_length)
        self._windows = store.tokens[: self.size * seq_length].reshape(self.size, seq_length)

    def rows(self, numbers: np.ndarray, epochs: np.ndarray) -> Rows:
        """As in Examples, but for the targets: they are the tokens at the same places."""
        s = self.seq_length
        targets = self._windows[numbers].astype(np.int64)
        token_types = sentences = None
        if self.sentence_order:
            sentences = (random_keys(self.seed ^ SENTENCES, epochs, numbers, count=1)[:, 0] & 1).astype(np.int64)
            targets[sentences == 1] = np.roll(targets[sentences == 1], s // 2, axis=1)
            begins = np.where(sentences == 1, s // 2, s - s // 2)  # of the second sentence
            token_types = (np.arange(s) >= begins[:, None]).astype(np.int64)
        keys = random_keys(self.seed, epochs, numbers, count=s + 2 * self.drawn)
        order, how, others = np.split(keys, [s, s + self.drawn], axis=1)
        order = np.where(targets == self.end_of_text, LAST, order >> 1)
        places = smallest(order, self.drawn)
        how, others = how * 2.0**-32, others.astype(np.int64) % self.vocab_size
        replaced = np.where(how < MASKED, self.mask, np.where(how < RANDOM, others, np.take_along_axis(targets, places, 1)))
        ids, counts = targets.copy(), np.zeros(targets.shape, bool)
        np.put_along_axis(ids, places, replaced, 1)
        np.put_along_axis(counts, places, True, 1)
        return Rows(ids, targets, counts, None, token_types, sentences)

    def counted(self, numbers: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """As in Examples."""
        return np.full(len(numbers), self.drawn, np.int64)

    def stretches(self, number: int, epoch: int) -> list[tuple[int, int]]:
        """As in Examples: the window."""
        return [(number * self.seq_length, (number + 1) * self.seq_length)]


def whole_windows(store: TokenStore, length: int) -> int:
    """The number of windows of `length` tokens that share none. A Mistake if not even one fits."""
    if store.num_tokens < length:
        raise Mistake(
            f"a sample is made of {length} tokens, and {store.prefix.name} has {store.num_tokens} → use a smaller model.seq_length, or "
            "more text"
        )
    return store.num_tokens // length
