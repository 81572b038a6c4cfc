"""What a validation predicts of samples that are no windows of the stream: masked tokens, replaced spans, the second sides of pairs.

Windows of the stream are in prepare.py: there every token of a text is predicted once. Here the samples of the first epoch are read in
order, and the tokens that count are predicted.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from parallel.errors import Mistake
from research.data.batches import Batch
from research.data.examples import Examples, Rows
from research.data.sources import SHARED
from research.data.tokenizer import Tokenizer

AT_ONCE = 256
"""Samples that are made at once to count the bytes of what is predicted."""


class HeldOutSamples(NamedTuple):
    """What a validation predicts: the targets that count of the first `samples` samples."""

    examples: Examples
    samples: int
    tokens: int
    """The targets that count."""
    num_bytes: int
    """UTF-8 bytes of the text of these targets. Special tokens have none, and a character that is predicted in part has those of U+FFFD."""
    source: str = SHARED
    """The name of the source that it is held out of."""


def held_out_samples(examples: Examples, tokens: int, tokenizer: Tokenizer, source: str = SHARED) -> HeldOutSamples:
    """The first samples with at least `tokens` targets that count; all samples if `tokens` is 0, or if there are fewer."""
    counted = examples.counted(np.arange(examples.size), np.zeros(examples.size, np.int64)).cumsum()
    if not counted[-1]:
        raise Mistake(f"no token counts in the {examples.size} samples of the validation text {examples.store.prefix.name} → use more text")
    samples = examples.size if tokens == 0 else min(int(np.searchsorted(counted, tokens)) + 1, examples.size)
    special = np.fromiter(tokenizer.backend.get_added_tokens_decoder(), np.int64)
    num_bytes = 0
    for first in range(0, samples, AT_ONCE):
        rows = _rows(examples, np.arange(first, min(first + AT_ONCE, samples)))
        for targets, counts in zip(rows.targets, _counts(rows), strict=True):
            predicted = targets[counts]
            num_bytes += len(tokenizer.decode(predicted[~np.isin(predicted, special)].tolist()).encode("utf-8"))
    return HeldOutSamples(examples, samples, int(counted[samples - 1]), num_bytes, source)


def held_out_batches(text: HeldOutSamples, micro_batch_size: int, data_rank: int, data_size: int) -> Iterator[tuple[Batch, int]]:
    """This data rank's part of every validation batch, and the number of targets of that batch that count, over all data ranks.

    Every sample is in one part. All parts have the same shape: the last ones repeat the last sample with weight 0. The mean over data ranks
    of Σ weights · loss is the batch's token mean, so Σ mean · tokens over the batches is the total loss in nats.
    """
    unit = micro_batch_size * data_size
    for first in range(0, math.ceil(text.samples / unit) * unit, unit):
        whole = np.arange(first, min(first + unit, text.samples))
        tokens = int(text.examples.counted(whole, np.zeros_like(whole)).sum())
        own = first + data_rank * micro_batch_size + np.arange(micro_batch_size)
        rows = _rows(text.examples, np.minimum(own, text.samples - 1))
        counts = _counts(rows) & (own < text.samples)[:, None]
        weights = counts * np.float32(data_size / max(tokens, 1))
        yield Batch(rows.ids, rows.targets, weights, own, rows.segments, rows.token_types, rows.sentences), tokens


def _rows(examples: Examples, numbers: np.ndarray) -> Rows:
    return examples.rows(numbers, np.zeros_like(numbers))


def _counts(rows: Rows) -> np.ndarray:
    """'b s' bool: the targets that count."""
    return np.ones(rows.targets.shape, bool) if rows.counts is None else rows.counts
