"""Examples: how the tokens of a store become the samples of a run, and the sampler that reads them for training.

Plain windows of the stream have a sampler of their own, which is faster (batches.StreamSampler). All others are classes of one protocol:
what a sample holds depends on its number and its epoch alone, so it is the same on every layout and after every resume.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from parallel.errors import Mistake
from research.data.batches import Batch, BatchSizes, Window, step_samples
from research.data.blend import Blend
from research.data.sample_order import Located, SampleOrder
from research.data.token_store import TokenStore


class Rows(NamedTuple):
    """Samples as a model takes them, and what the loss counts.

    For an encoder and a decoder, ids and segments are 'b (s + t)', a source and behind it what the decoder reads; targets are 'b t'.
    """

    ids: np.ndarray  # b s, int64
    targets: np.ndarray  # b s, int64
    counts: np.ndarray | None = None  # b s, bool: whether the loss of the target counts; None: of all
    segments: np.ndarray | None = None  # b s, int64: equal numbers attend to each other; None: attention is not confined
    token_types: np.ndarray | None = None  # b s, int64: 0 or 1, the first or the second sentence; None: all 0
    sentences: np.ndarray | None = None  # b, int64: what the sentence head is to say; None: there is none


class Examples(Protocol):
    """The samples of one store. A class of variant.py has the constructor `Class(store, tokenizer, seq_length, seed)`."""

    store: TokenStore
    size: int
    """The samples of an epoch."""
    confines: bool
    """Whether rows have segments, which then travel through the model: the same for all examples of a run."""

    def rows(self, numbers: np.ndarray, epochs: np.ndarray) -> Rows:
        """The samples 'b' of these numbers, each in [0, size), in these epochs. All rows of a class have one length."""

    def counted(self, numbers: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """'b' int64: how many targets of each sample count. O(1) for each; the rows need not be made."""

    def stretches(self, number: int, epoch: int) -> list[tuple[int, int]]:
        """The stretches [start, stop) of the store that a sample is made from, in order, its last target included."""


class ExampleSampler:
    """The Sampler (batches.py) of examples of one or several stores, in the proportions of a blend. The loss of a step is the mean over
    the targets of its whole batch that count."""

    def __init__(self, examples: Sequence[Examples], blend: Blend, batch_sizes: BatchSizes, micro_batch_size: int, seed: int) -> None:
        self.examples, self.batch_sizes, self.micro_batch_size = tuple(examples), batch_sizes, micro_batch_size
        self.order = SampleOrder(blend, [one.size for one in examples], seed)

    def micro_batches(self, step: int, data_rank: int, data_size: int) -> Iterator[Batch]:
        """As in Sampler. A Mistake if no target of the whole step counts."""
        numbers = step_samples(self.batch_sizes, self.micro_batch_size, data_rank, data_size, step)
        total = self.mask_sum(step)
        if not total:
            first, last = (int(sample) for sample in (self.samples(step)[0], self.samples(step)[-1]))
            raise Mistake(
                f"no token counts in the {last - first + 1} samples of step {step + 1}, so it has no loss → use a larger "
                f"schedule.batch_size, or a text of which more counts; the samples: data RUN --step {step + 1}"
            )
        weight = np.float32(len(numbers) * data_size / total)
        for samples in numbers:
            rows = self._rows(self.order.consecutive(samples))
            weights = np.full(rows.targets.shape, weight, np.float32) if rows.counts is None else rows.counts * weight
            yield Batch(rows.ids, rows.targets, weights, samples, rows.segments, rows.token_types, rows.sentences)

    def mask_sum(self, step: int) -> int:
        """As in Sampler."""
        located = self.order.locate(np.array(self.samples(step)))
        return sum(
            int(one.counted(located.windows[here], located.epochs[here]).sum())
            for source, one in enumerate(self.examples)
            if (here := located.sources == source).any()
        )

    def locate(self, samples: np.ndarray) -> Located:
        """As in Sampler."""
        return self.order.locate(samples)

    def samples(self, step: int) -> range:
        """As in Sampler."""
        return range(self.batch_sizes.before(step), self.batch_sizes.before(step + 1))

    def windows(self, sample: int) -> list[Window]:
        """As in Sampler."""
        source, number, epoch = (int(found[0]) for found in self.order.locate(np.array([sample])))
        one = self.examples[source]
        return [Window(sample, epoch, number, one.store, *stretch) for stretch in one.stretches(number, epoch)]

    def epochs(self, samples: int) -> np.ndarray:
        """As in Sampler."""
        return self.order.epochs(samples)

    @property
    def summaries(self) -> list[str]:
        """What an epoch of each source holds and what is missing in it, of the classes that say so in an attribute `summary`."""
        return [summary for one in self.examples if (summary := getattr(one, "summary", ""))]

    def _rows(self, located: Located) -> Rows:
        """The samples of a micro-batch, each from its own source."""
        if len(self.examples) == 1:
            return self.examples[0].rows(located.windows, located.epochs)
        parts = {
            source: self.examples[source].rows(located.windows[here], located.epochs[here])
            for source in np.unique(located.sources).tolist()
            if (here := located.sources == source).any()
        }
        ids, targets, *others = (
            _together(located.sources, {source: rows[i] for source, rows in parts.items()}) for i in range(len(Rows._fields))
        )
        assert ids is not None and targets is not None
        return Rows(ids, targets, *others)


def _together(sources: np.ndarray, parts: dict[int, np.ndarray | None]) -> np.ndarray | None:
    """'b …': the rows of several sources in the order of the samples. Where some sources count everything, their part is None."""
    there = [part for part in parts.values() if part is not None]
    if not there:
        return None
    found = np.ones((len(sources), *there[0].shape[1:]), there[0].dtype)
    for source, part in parts.items():
        if part is not None:
            found[sources == source] = part
    return found
