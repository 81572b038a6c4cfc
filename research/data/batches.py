"""Tokens into micro-batches: which windows of the stream a data rank sees in a step, and what each token weighs.

Sample i is tokens[i*s : i*s + s + 1]: windows follow one another and share the boundary token, so that an epoch predicts
every token but the very first (and, in training, the rest that fills no window) once.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from parallel.errors import Mistake
from research.data import order
from research.data.token_store import TokenStore


class Batch(NamedTuple):
    """One pass of one data rank: `targets` are `ids` one token later.

    The loss of a pass is Σ weights · loss; averaged over a step's passes and data ranks it is the mean over the tokens
    of the step's whole batch.
    """

    ids: np.ndarray  # b s, int64
    targets: np.ndarray  # b s, int64
    weights: np.ndarray  # b s, float32
    samples: np.ndarray  # b, int64: the run's sample numbers, counted over epochs


def num_samples(store: TokenStore, seq_length: int) -> int:
    """Full windows of the store, samples of one epoch; a Mistake if not even one fits."""
    found = (store.num_tokens - 1) // seq_length
    if found < 1:
        raise Mistake(
            f"model.seq_length = {seq_length} is longer than the training corpus: {store.prefix.name} has "
            f"{store.num_tokens} tokens → use model.seq_length = {store.num_tokens - 1} or less, or more text"
        )
    return found


def epochs(store: TokenStore, seq_length: int, samples: int) -> float:
    """How often `samples` samples go through the store."""
    return samples / num_samples(store, seq_length)


def micro_batches_per_step(batch_size: int, micro_batch_size: int, data_size: int) -> int:
    """Passes of each data rank in a step; a Mistake if they do not come out even."""
    together = micro_batch_size * data_size
    if batch_size % together:
        raise Mistake(
            f"schedule.batch_size = {batch_size} is no multiple of schedule.micro_batch_size = {micro_batch_size} × "
            f"{data_size} data ranks → use {max(1, batch_size // together) * together} or {(batch_size // together + 1) * together}"
        )
    return batch_size // together


def step_samples(batch_size: int, micro_batch_size: int, data_rank: int, data_size: int, step: int) -> np.ndarray:
    """'m b': the run's sample numbers, counted over epochs, in each micro-batch of one step of this data rank.

    A step is batch_size consecutive numbers, whatever the layout; data rank r takes the r-th equal share of them.
    """
    passes = micro_batches_per_step(batch_size, micro_batch_size, data_size)
    first = step * batch_size + data_rank * (batch_size // data_size)
    return first + np.arange(passes * micro_batch_size).reshape(passes, micro_batch_size)


def train_micro_batches(
    store: TokenStore,
    seq_length: int,
    batch_size: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    seed: int,
    step: int,
) -> Iterator[Batch]:
    """The micro-batches of one step of this data rank, in order. Step and arguments decide everything: there is no state."""
    numbers = step_samples(batch_size, micro_batch_size, data_rank, data_size, step)
    tokens = batch_size * seq_length  # of the global batch: plain windows mask nothing
    weight = len(numbers) * data_size / tokens
    every = num_samples(store, seq_length)
    for samples in numbers:
        yield _batch(store, order.sample(samples, every, seed), samples, seq_length, weight)


def validation_batches(
    store: TokenStore, seq_length: int, micro_batch_size: int, data_rank: int, data_size: int
) -> Iterator[tuple[Batch, int]]:
    """This data rank's part of every evaluation batch, and the tokens of that batch over all data ranks.

    Every token but the first is predicted once; all parts have one shape, filled up with weight 0. The mean over data ranks
    of Σ weights · loss is the batch's token mean, so Σ mean · tokens over the batches is the split's nats.
    """
    predicted = _predicted(store)
    together = micro_batch_size * data_size
    for first in range(0, math.ceil(predicted / seq_length), together):
        tokens = min(predicted - first * seq_length, together * seq_length)
        windows = first + data_rank * micro_batch_size + np.arange(micro_batch_size)
        yield _batch(store, windows, windows, seq_length, data_size / tokens), tokens


def _predicted(store: TokenStore) -> int:
    if store.num_tokens < 2:
        raise Mistake(f"the validation corpus {store.prefix.name} has {store.num_tokens} token, nothing to predict → use more text")
    return store.num_tokens - 1


def _batch(store: TokenStore, windows: np.ndarray, samples: np.ndarray, seq_length: int, weight: float) -> Batch:
    """The windows' tokens; what lies beyond the end of the store is id 0, target 0, weight 0."""
    shape = (len(windows), seq_length)
    batch = Batch(np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.float32), samples)
    for row, window in enumerate(windows):
        start = int(window) * seq_length
        tokens = store.tokens[start : start + seq_length + 1]
        count = max(len(tokens) - 1, 0)
        batch.ids[row, :count] = tokens[:count]
        batch.targets[row, :count] = tokens[1 : count + 1]
        batch.weights[row, :count] = weight
    return batch
