"""Micro-batches from a token store: which windows of the stream a data rank sees in a step, and the loss weight of each token.

Sample i is tokens[i*s : i*s + s + 1]. Windows follow one another and share the boundary token, so that an epoch predicts every
token but the very first exactly once (in training also without the rest at the end, which fills no window).
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from parallel.errors import Mistake
from research.data.blend import Blend, Stage
from research.data.sample_order import Located, SampleOrder
from research.data.token_store import TokenStore


class Batch(NamedTuple):
    """One pass of one data rank. `targets` are `ids` one token later, or what the class of the samples says (examples.py).

    The loss of a pass is Σ weights · loss; averaged over a step's passes and data ranks it is the mean over the tokens
    of the step's whole batch.
    """

    ids: np.ndarray  # b s, int64
    targets: np.ndarray  # b s, int64
    weights: np.ndarray  # b s, float32
    samples: np.ndarray  # b, int64: the run's sample numbers, counted over epochs
    segments: np.ndarray | None = None  # b s, int64: equal numbers attend to each other; None: attention is not confined
    token_types: np.ndarray | None = None  # b s, int64: 0 or 1, the first or the second sentence; None: all 0
    sentences: np.ndarray | None = None  # b, int64: what the sentence head is to say; None: there is none

    @property
    def labels(self) -> tuple[np.ndarray, ...]:
        """What models.gpt.TokenLoss takes beside the logits; with `sentences`, what models.bert.PretrainingLoss takes.

        Every pass of a step has as many samples, so each weighs 1/b of the pass's mean over sentences.
        """
        if self.sentences is None:
            return self.targets, self.weights
        return self.targets, self.weights, self.sentences, np.full(len(self.sentences), 1 / len(self.sentences), np.float32)

    @property
    def context(self) -> dict[str, np.ndarray]:
        """What layers may read beside x, by name."""
        beside = {"segments": self.segments, "token_types": self.token_types}
        return {"samples": self.samples} | {name: array for name, array in beside.items() if array is not None}


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


class BatchSizes(Protocol):
    """The number of samples of each step: research.config.batch_sizes.BatchSizes. research/data/ imports no other room."""

    def of(self, step: int) -> int:
        """The samples of a step, counted from 0."""

    def before(self, step: int) -> int:
        """The samples of all steps before `step`."""


class SequenceLengths(Protocol):
    """The number of tokens of each sample: research.config.sequence_lengths.SequenceLengths."""

    def of(self, sample: int) -> int:
        """The tokens of a sample, by its number in the run; equal for all samples of a step."""


def micro_batches_per_step(batch_size: int, micro_batch_size: int, data_size: int) -> int:
    """The number of passes that each data rank makes per step. A Mistake if the batch cannot be split evenly."""
    unit = micro_batch_size * data_size
    if batch_size % unit:
        raise Mistake(
            f"schedule.batch_size = {batch_size} is no multiple of schedule.micro_batch_size = {micro_batch_size} × "
            f"{data_size} data ranks → use {max(1, batch_size // unit) * unit} or {(batch_size // unit + 1) * unit}"
        )
    return batch_size // unit


def step_samples(batch_sizes: BatchSizes, micro_batch_size: int, data_rank: int, data_size: int, step: int) -> np.ndarray:
    """'m b': the run's sample numbers, counted over epochs, in each micro-batch of one step of this data rank.

    The samples of a step are consecutive numbers, whatever the layout; data rank r takes the r-th equal share of them.
    """
    size = batch_sizes.of(step)
    passes = micro_batches_per_step(size, micro_batch_size, data_size)
    first = batch_sizes.before(step) + data_rank * (size // data_size)
    return np.arange(first, first + passes * micro_batch_size).reshape(passes, micro_batch_size)


class Window(NamedTuple):
    """Where a sample, or a part of one, comes from: its ids, and after them its last target, are store.tokens[start:stop]."""

    sample: int
    """The run's sample number, counted over epochs."""
    epoch: int
    """Of the store, counted from 0."""
    number: int
    """Of the sample among those of the store, counted from 0."""
    store: TokenStore
    start: int
    stop: int


class Sampler(Protocol):
    """What training reads: the micro-batches of any step, on any layout. They depend on the arguments alone: there is no state."""

    def micro_batches(self, step: int, data_rank: int, data_size: int) -> Iterator[Batch]:
        """The micro-batches of one step (from 0) of this data rank, in order."""

    def mask_sum(self, step: int) -> int:
        """The number of tokens of the step's whole batch whose loss counts. It is known without communication."""

    def locate(self, samples: np.ndarray) -> Located:
        """The windows that samples of the run are, by their numbers, in any shape."""

    def samples(self, step: int) -> range:
        """The run's sample numbers in one step (from 0), over all data ranks."""

    def windows(self, sample: int) -> list[Window]:
        """Where a sample comes from, in the order in which it is read: one stretch of a store, or several."""

    def epochs(self, samples: int) -> np.ndarray:
        """'sources': the number of passes through each source that the first `samples` samples of the run make."""


class StreamSampler:
    """Samples are windows of the token streams of one or several stores, in the proportions of a blend. Every token counts.

    With `lengths`, a sample is the beginning of its window: as many tokens as they say, and one more, which is only predicted.

    Their order is that of SampleOrder.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        blend: Blend,
        seq_length: int,
        batch_sizes: BatchSizes,
        micro_batch_size: int,
        seed: int,
        lengths: SequenceLengths | None = None,
    ) -> None:
        """`lengths`: none above `seq_length`; None: all samples are whole windows."""
        self.stores, self.seq_length = tuple(stores), seq_length
        self.batch_sizes, self.micro_batch_size, self.lengths = batch_sizes, micro_batch_size, lengths
        self.order = SampleOrder(blend, [num_samples(store, seq_length) for store in stores], seed)
        self._views = [windows_of(store.tokens, seq_length) for store in stores]
        self._weights = lru_cache(1)(self._equal_weights)

    def micro_batches(self, step: int, data_rank: int, data_size: int) -> Iterator[Batch]:
        """As in Sampler."""
        numbers = step_samples(self.batch_sizes, self.micro_batch_size, data_rank, data_size, step)
        length = self._length(self.batch_sizes.before(step))
        weights = self._weights(len(numbers) * data_size / self.mask_sum(step), length)
        for samples in numbers:
            located = self.order.consecutive(samples)
            tokens = self._tokens(located.sources, located.windows)[:, : length + 1]
            yield Batch(tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64), weights, samples)

    def mask_sum(self, step: int) -> int:
        """As in Sampler."""
        return self.batch_sizes.of(step) * self._length(self.batch_sizes.before(step))

    def locate(self, samples: np.ndarray) -> Located:
        """As in Sampler."""
        return self.order.locate(samples)

    def samples(self, step: int) -> range:
        """As in Sampler."""
        return range(self.batch_sizes.before(step), self.batch_sizes.before(step + 1))

    def windows(self, sample: int) -> list[Window]:
        """As in Sampler: one window."""
        source, number, epoch = (int(found[0]) for found in self.locate(np.array([sample])))
        start = number * self.seq_length
        return [Window(sample, epoch, number, self.stores[source], start, start + self._length(sample) + 1)]

    def epochs(self, samples: int) -> np.ndarray:
        """As in Sampler."""
        return self.order.epochs(samples)

    def _length(self, sample: int) -> int:
        """The tokens of a sample that are read."""
        return self.seq_length if self.lengths is None else self.lengths.of(sample)

    def _tokens(self, sources: np.ndarray, windows: np.ndarray) -> np.ndarray:
        """'b s+1': the windows, in the type of the only source, or in int64."""
        if len(self.stores) == 1:
            return self._views[0][windows]
        tokens = np.empty((len(windows), self.seq_length + 1), np.int64)
        for row, (source, window) in enumerate(zip(sources.tolist(), windows.tolist(), strict=True)):
            tokens[row] = self._views[source][window]
        return tokens

    def _equal_weights(self, weight: float, length: int) -> np.ndarray:
        """'b s': the same weight for each token of a micro-batch. All micro-batches of equal weight and length share the array."""
        return np.full((self.micro_batch_size, length), weight, np.float32)


def one_source(
    store: TokenStore,
    seq_length: int,
    batch_sizes: BatchSizes,
    micro_batch_size: int,
    seed: int,
    lengths: SequenceLengths | None = None,
) -> StreamSampler:
    """The sampler of a single store."""
    blend = Blend([store.prefix.name], [Stage(0, (1.0,))], seed)
    return StreamSampler([store], blend, seq_length, batch_sizes, micro_batch_size, seed, lengths)


def windows_of(tokens: np.ndarray, seq_length: int) -> np.ndarray:
    """'n s+1': all windows of a stream as a view of it. Each begins with the last token of the one before."""
    size = tokens.itemsize
    shape = ((len(tokens) - 1) // seq_length, seq_length + 1)
    return np.lib.stride_tricks.as_strided(tokens, shape, (seq_length * size, size), writeable=False)


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
