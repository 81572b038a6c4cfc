"""The sampler of examples: the same step on every layout, the mean over what counts, and confined windows of a stream."""

import itertools

import numpy as np
import pytest

from parallel.errors import Mistake
from research.config.batch_sizes import BatchSizes
from research.data import confined
from research.data.batches import one_source
from research.data.blend import Blend, Stage
from research.data.confined import ConfinedStream
from research.data.examples import ExampleSampler, Rows
from research.data.packing import PackedDocuments
from tests.research.data.test_packing import END, Ends, store_of

LENGTHS = [3, 12, 25, 8, 1, 9, 14, 2, 2, 30, 6, 7, 11]


class OddTargets:
    """A class as an experiment may have one: half of the targets count, those of even samples in even epochs none."""

    confines = False

    def __init__(self, store, tokenizer, seq_length, seed) -> None:
        self.store, self.size = store, 6

    def rows(self, numbers, epochs) -> Rows:
        targets = numbers[:, None] * 10 + np.arange(4) + 100 * epochs[:, None]
        counts = (targets % 2 == 1) & ((numbers + epochs) % 2 == 1)[:, None]
        return Rows(targets, targets, counts)

    def counted(self, numbers, epochs) -> np.ndarray:
        return np.where((numbers + epochs) % 2 == 1, 2, 0)

    def stretches(self, number, epoch) -> list[tuple[int, int]]:
        return [(number, number + 1)]


def sampler_of(stores, kind, micro: int, batch_size: int = 24, weights=None) -> ExampleSampler:
    blend = Blend([f"source {i}" for i in range(len(stores))], [Stage(0, weights or (1.0,) * len(stores))], 5)
    return ExampleSampler([kind(store, Ends(), 10, 3) for store in stores], blend, BatchSizes(batch_size), micro, 3)


@pytest.mark.parametrize("kind", [ConfinedStream, PackedDocuments, OddTargets])
def test_a_step_is_the_same_on_every_layout_and_its_weights_are_those_of_a_mean(tmp_path, kind) -> None:
    """Two sources of different shares. The weights of all passes, averaged as the engines do, add up to 1."""
    stores = [store_of(tmp_path, LENGTHS, "a"), store_of(tmp_path, LENGTHS[::-1] * 2, "b")]
    for step in range(4):
        found = []
        for data_size, micro in ((1, 24), (1, 1), (2, 3), (4, 2)):
            sampler = sampler_of(stores, kind, micro, weights=(0.3, 0.7))
            batches = [batch for rank in range(data_size) for batch in sampler.micro_batches(step, rank, data_size)]
            assert sum(batch.weights.sum(dtype=np.float64) for batch in batches) / len(batches) == pytest.approx(1, rel=1e-5)
            assert sum(np.count_nonzero(batch.weights) for batch in batches) == sampler.mask_sum(step)
            parts = [(batch.ids, batch.targets, batch.weights > 0, batch.samples, batch.context.get("segments")) for batch in batches]
            found.append([None if part[0] is None else np.concatenate(part) for part in zip(*parts, strict=True)])
        for one, other in itertools.pairwise(found):
            assert all((a is None and b is None) or (a == b).all() for a, b in zip(one, other, strict=True))


def test_an_epoch_has_every_sample_once(tmp_path) -> None:
    store = store_of(tmp_path, LENGTHS)
    sampler = sampler_of([store], PackedDocuments, 1, batch_size=1)
    size = sampler.examples[0].size
    seen = [(batch.targets[batch.weights > 0]).tolist() for step in range(size) for batch in sampler.micro_batches(step, 0, 1)]
    assert sorted(token for row in seen for token in row) == sorted(store.tokens.tolist())
    assert sampler.epochs(size).tolist() == [1.0]
    stretches = [stretch for sample in range(size) for stretch in sampler.windows(sample)]
    assert sum(stretch.stop - stretch.start for stretch in stretches) == store.num_tokens
    assert {stretch.epoch for stretch in stretches} == {0} and {w.epoch for w in sampler.windows(size)} == {1}


def test_a_confined_window_has_the_tokens_of_the_stream_and_its_documents(tmp_path) -> None:
    """The same ids and targets as StreamSampler; a segment begins at the end-of-text before a document."""
    store = store_of(tmp_path, LENGTHS)
    ours, plain = sampler_of([store], ConfinedStream, 4), one_source(store, 10, BatchSizes(24), 4, 3)
    for step in range(3):
        for a, b in zip(ours.micro_batches(step, 0, 1), plain.micro_batches(step, 0, 1), strict=True):
            assert (a.ids == b.ids).all() and (a.targets == b.targets).all() and a.weights == pytest.approx(b.weights)
            assert a.segments is not None
            for ids, targets, segments in zip(a.ids, a.targets, a.segments, strict=True):
                documents = [target // 100 if target != END else None for target in targets.tolist()]
                for (i, one), (j, other) in itertools.combinations(enumerate(documents), 2):
                    if one is not None and other is not None:
                        assert (segments[i] == segments[j]) == (one == other)
                assert (np.diff(segments) == (ids[1:] == END)).all()


def test_a_step_in_which_nothing_counts_is_refused(tmp_path) -> None:
    class Silent(OddTargets):
        def counted(self, numbers, epochs) -> np.ndarray:
            return np.zeros(len(numbers), np.int64)

    sampler = sampler_of([store_of(tmp_path, LENGTHS)], Silent, 2)
    with pytest.raises(Mistake, match="no token counts in the 24 samples of step 3, so it has no loss → use a larger schedule.batch_size"):
        next(sampler.micro_batches(2, 0, 1))


def test_documents_without_ends_cannot_be_confined(token_store) -> None:
    with pytest.raises(Mistake, match=r"stream has no end-of-text \(9999\) behind its first document, .*'stream'"):
        ConfinedStream(token_store(100), Ends(), 10, 1)
    assert confined.segments(np.array([[5, END, 6, END, END]]), END).tolist() == [[0, 1, 1, 2, 3]]
