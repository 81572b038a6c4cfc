"""Micro-batches from a token store: which windows of the stream a data rank sees in a step, and the loss weight of each token.

Sample i is tokens[i*s : i*s + s + 1]. Windows follow one another and share the boundary token, so that an epoch predicts every
token but the very first exactly once (in training also without the rest at the end, which fills no window).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from parallel.errors import Mistake
from research.data import order
from research.data.token_store import TokenStore


class Batch(NamedTuple):
    """One pass of one data rank. `targets` are `ids` one token later.

    The loss of a pass is Σ weights · loss; averaged over a step's passes and data ranks it is the mean over the tokens
    of the step's whole batch.
    """

    ids: np.ndarray  # b s, int64
    targets: np.ndarray  # b s, int64
    weights: np.ndarray  # b s, float32
    samples: np.ndarray  # b, int64: the run's sample numbers, counted over epochs

    @property
    def labels(self) -> tuple[np.ndarray, np.ndarray]:
        """What models.gpt.TokenLoss takes beside the logits."""
        return self.targets, self.weights

    @property
    def context(self) -> dict[str, np.ndarray]:
        """What layers may read beside x, by name."""
        return {"samples": self.samples}


def num_samples(store: TokenStore, seq_length: int) -> int:
    """The number of full windows of the store, which are the samples of one epoch. A Mistake if not even one fits."""
    if store.num_tokens <= seq_length:
        raise Mistake(
            f"model.seq_length = {seq_length} is longer than the training corpus: {store.prefix.name} has "
            f"{store.num_tokens} tokens → use model.seq_length = {store.num_tokens - 1} or less, or more text"
        )
    return (store.num_tokens - 1) // seq_length


def epochs(store: TokenStore, seq_length: int, samples: int) -> float:
    """The number of passes through the store that `samples` samples make."""
    return samples / num_samples(store, seq_length)


def micro_batches_per_step(batch_size: int, micro_batch_size: int, data_size: int) -> int:
    """The number of passes that each data rank makes per step. A Mistake if the batch cannot be split evenly."""
    unit = micro_batch_size * data_size
    if batch_size % unit:
        raise Mistake(
            f"schedule.batch_size = {batch_size} is no multiple of schedule.micro_batch_size = {micro_batch_size} × "
            f"{data_size} data ranks → use {max(1, batch_size // unit) * unit} or {(batch_size // unit + 1) * unit}"
        )
    return batch_size // unit


def step_samples(batch_size: int, micro_batch_size: int, data_rank: int, data_size: int, step: int) -> np.ndarray:
    """'m b': the run's sample numbers, counted over epochs, in each micro-batch of one step of this data rank.

    A step is batch_size consecutive numbers, whatever the layout; data rank r takes the r-th equal share of them.
    """
    passes = micro_batches_per_step(batch_size, micro_batch_size, data_size)
    first = step * batch_size + data_rank * (batch_size // data_size)
    return first + np.arange(passes * micro_batch_size).reshape(passes, micro_batch_size)


class Window(NamedTuple):
    """Where a sample comes from: its ids, and after them its last target, are store.tokens[start:stop]."""

    sample: int
    """The run's sample number, counted over epochs."""
    epoch: int
    """Of the store, counted from 0."""
    number: int
    """Among the windows of the store, counted from 0."""
    store: TokenStore
    start: int
    stop: int


class Sampler(Protocol):
    """What training reads: the micro-batches of any step, on any layout. They depend on the arguments alone: there is no state."""

    def micro_batches(self, step: int, data_rank: int, data_size: int) -> Iterator[Batch]:
        """The micro-batches of one step (from 0) of this data rank, in order."""

    def mask_sum(self, step: int) -> int:
        """The number of tokens of the step's whole batch whose loss counts. It is known without communication."""

    def samples(self, step: int) -> range:
        """The run's sample numbers in one step (from 0), over all data ranks."""

    def window(self, sample: int) -> Window:
        """Where a sample comes from."""


@dataclass(frozen=True)
class StreamSampler:
    """Samples are the windows of one store's stream, each epoch in an order of its own (order.py). Every token counts."""

    store: TokenStore
    seq_length: int
    batch_size: int
    micro_batch_size: int
    seed: int

    def micro_batches(self, step: int, data_rank: int, data_size: int) -> Iterator[Batch]:
        """As in Sampler."""
        numbers = step_samples(self.batch_size, self.micro_batch_size, data_rank, data_size, step)
        weight = len(numbers) * data_size / self.mask_sum(step)
        windows = num_samples(self.store, self.seq_length)
        for samples in numbers:
            yield _batch(self.store.tokens, order.sample(samples, windows, self.seed), samples, self.seq_length, weight)

    def mask_sum(self, step: int) -> int:
        """As in Sampler."""
        return self.batch_size * self.seq_length

    def samples(self, step: int) -> range:
        """As in Sampler."""
        return range(step * self.batch_size, (step + 1) * self.batch_size)

    def window(self, sample: int) -> Window:
        """As in Sampler."""
        windows = num_samples(self.store, self.seq_length)
        number = order.sample(sample, windows, self.seed)
        start = number * self.seq_length
        return Window(sample, sample // windows, number, self.store, start, start + self.seq_length + 1)


def validation_batches(
    ids: np.ndarray, seq_length: int, micro_batch_size: int, data_rank: int, data_size: int
) -> Iterator[tuple[Batch, int]]:
    """This data rank's part of every validation batch, and the number of tokens of that batch over all data ranks.

    Every token of `ids` but the first is predicted once. All parts have the same shape, padded with weight 0. The mean over data ranks
    of Σ weights · loss is the batch's token mean, so Σ mean · tokens over the batches is the total loss of `ids` in nats.
    """
    predicted, unit = len(ids) - 1, micro_batch_size * data_size
    for first in range(0, math.ceil(predicted / seq_length), unit):
        tokens = min(predicted - first * seq_length, unit * seq_length)
        windows = first + data_rank * micro_batch_size + np.arange(micro_batch_size)
        yield _batch(ids, windows, windows, seq_length, data_size / tokens), tokens


def _batch(ids: np.ndarray, windows: np.ndarray, samples: np.ndarray, seq_length: int, weight: float) -> Batch:
    """The tokens of the windows of a stream. Beyond its end are id 0, target 0, weight 0."""
    shape = (len(windows), seq_length)
    batch = Batch(np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.float32), samples)
    for row, window in enumerate(windows):
        start = int(window) * seq_length
        tokens = ids[start : start + seq_length + 1]
        count = max(len(tokens) - 1, 0)
        batch.ids[row, :count] = tokens[:count]
        batch.targets[row, :count] = tokens[1 : count + 1]
        batch.weights[row, :count] = weight
    return batch
