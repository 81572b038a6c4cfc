"""Batches: every token predicted once, and the same step whatever the layout. Stores hold token k at position k."""

import itertools
from collections import Counter

import numpy as np
import pytest

from parallel.errors import Mistake
from research.config.batch_sizes import BatchSizes
from research.config.sequence_lengths import SequenceLengths
from research.data import batches, order

LAYOUTS = [(1, 1), (1, 4), (2, 1), (2, 3), (4, 2), (5, 1)]
"""(data ranks, sequences a micro-batch)"""


def step_of(store, s, data_size, micro, step, batch_size=24, seed=3):
    """Every micro-batch of a step, data rank by data rank."""
    sampler = batches.one_source(store, s, BatchSizes(batch_size), micro, seed)
    return [list(sampler.micro_batches(step, r, data_size)) for r in range(data_size)]


def test_the_mask_s_sum_is_what_the_weights_are_made_of(token_store):
    """On every layout the weights of all passes, each over passes × data ranks, add up to 1: that of a mean over `mask_sum` tokens."""
    sampler = batches.one_source(token_store(101), 10, BatchSizes(24), 2, seed=3)
    for data_size in (1, 2, 3):
        found = [batch for rank in range(data_size) for batch in sampler.micro_batches(4, rank, data_size)]
        assert sum((batch.weights > 0).sum() for batch in found) == sampler.mask_sum(4)
        assert sum(batch.weights.sum(dtype=np.float64) for batch in found) / len(found) == pytest.approx(1, rel=1e-6)


def test_a_sample_is_a_window_and_targets_follow(token_store):
    found = list(batches.one_source(token_store(101), 10, BatchSizes(4), 2, seed=7).micro_batches(5, 0, 1))
    assert len(found) == 2
    windows = [order.sample(5 * 4 + j, 10, 7) for j in range(4)]
    for row, window in enumerate(windows):
        batch = found[row // 2]
        assert batch.ids[row % 2].tolist() == list(range(window * 10, window * 10 + 10))
        assert batch.targets[row % 2].tolist() == list(range(window * 10 + 1, window * 10 + 11))
    assert (found[0].ids.dtype, found[0].targets.dtype, found[0].weights.dtype) == (np.int64, np.int64, np.float32)


@pytest.mark.parametrize(("data_size", "micro"), [(2, 1), (2, 3), (4, 2), (3, 8), (1, 24)])
def test_a_step_is_the_same_sequences_in_the_same_order_on_every_layout(token_store, data_size, micro):
    store = token_store(1000)
    for step in (0, 3, 4):  # 111 samples an epoch: step 4 crosses into the next
        alone = np.concatenate([batch.ids for batch in step_of(store, 9, 1, 1, step)[0]])
        cut = np.concatenate([batch.ids for rank in step_of(store, 9, data_size, micro, step) for batch in rank])
        assert (alone == cut).all()


@pytest.mark.parametrize(("data_size", "micro"), [(1, 1), (2, 3), (4, 2)])
def test_engine_averages_give_the_token_mean(token_store, data_size, micro):
    """Σ weights·loss of a pass, averaged over passes and ranks as the engines do, is the mean over the step's tokens."""
    ranks = step_of(token_store(1000), 9, data_size, micro, 2)
    loss = lambda batch: np.sin(batch.targets)  # noqa: E731  a stand-in that differs from token to token
    averaged = np.mean([[(batch.weights * loss(batch)).sum() for batch in rank] for rank in ranks])
    exact = np.mean([loss(batch) for rank in ranks for batch in rank])
    assert averaged == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(("data_size", "micro"), [(1, 1), (2, 3), (4, 2)])
def test_shorter_samples_are_the_beginnings_of_the_same_windows(token_store, data_size, micro):
    """A ramp from 3 tokens to 9 by 2, over 60 samples of steps of 24: 3, 5 (from sample 20 on), 7 (from 40 on), 9."""
    store, sizes = token_store(1000), BatchSizes(24)
    sampler = batches.one_source(store, 9, sizes, micro, 3, SequenceLengths(9, sizes, (3, 2, 60)))
    for step, length in enumerate([3, 5, 7, 9, 9]):
        ranks = [list(sampler.micro_batches(step, rank, data_size)) for rank in range(data_size)]
        found, whole = ([batch for rank in one for batch in rank] for one in (ranks, step_of(store, 9, data_size, micro, step)))
        for short, long in zip(found, whole, strict=True):
            assert short.ids.shape == short.targets.shape == short.weights.shape == (micro, length)
            assert (short.ids == long.ids[:, :length]).all() and (short.targets == long.targets[:, :length]).all()
            assert (short.samples == long.samples).all() and short.ids.flags.c_contiguous and short.targets.flags.c_contiguous
        assert sampler.mask_sum(step) == 24 * length
        assert np.mean([batch.weights.sum(dtype=np.float64) for batch in found]) == pytest.approx(1, rel=1e-6)
        number = int(found[0].samples[0])
        window = sampler.windows(number)[0]
        read = [*found[0].ids[0].tolist(), int(found[0].targets[0, -1])]
        assert (sampler.samples(step)[0], store.tokens[window.start : window.stop].tolist()) == (number, read)


def test_an_epoch_predicts_every_token_but_the_first_once(token_store):
    store = token_store(241)  # 24 samples of 10: exactly three steps of 8
    steps = [step_of(store, 10, 2, 2, step, batch_size=8) for step in range(3)]
    seen = Counter(int(t) for step in steps for rank in step for batch in rank for t in batch.targets.flat)
    assert seen == Counter(range(1, 241))


def test_sample_numbers_count_over_epochs():
    assert batches.step_samples(BatchSizes(8), 2, 1, 2, step=100).tolist() == [[804, 805], [806, 807]]


@pytest.mark.parametrize(("data_size", "micro"), [(1, 24), (2, 1), (2, 3), (4, 2), (3, 8)])
def test_a_batch_names_its_samples_in_the_run(token_store, data_size, micro):
    """Sequence j of step t is sample t·24 + j, whatever the layout: the numbers of a step in order, beside their windows."""
    store = token_store(1000)
    for step in (0, 3, 4, 341, 1000):  # sample 8,192, where a new span begins, is in the middle of step 341
        found = [batch for rank in step_of(store, 9, data_size, micro, step) for batch in rank]
        assert all(batch.samples.dtype == np.int64 and batch.samples.shape == (micro,) for batch in found)
        numbers = np.concatenate([batch.samples for batch in found])
        assert numbers.tolist() == list(range(24 * step, 24 * step + 24))
        firsts = np.concatenate([batch.ids[:, 0] for batch in found])
        assert (firsts == order.sample(numbers, 111, 3) * 9).all()


def test_a_window_has_another_number_in_every_epoch(token_store):
    """24 windows, three epochs of three steps: each window comes thrice under three numbers, one of each epoch."""
    store = token_store(241)
    numbers: dict[int, list[int]] = {}
    for step in range(9):
        for batch in (batch for rank in step_of(store, 10, 2, 2, step, batch_size=8) for batch in rank):
            for first, number in zip(batch.ids[:, 0].tolist(), batch.samples.tolist(), strict=True):
                numbers.setdefault(first // 10, []).append(number)
    assert sorted(numbers) == list(range(24))
    assert all([number // 24 for number in found] == [0, 1, 2] for found in numbers.values())


def test_validation_batches_name_their_windows(token_store):
    """They drop nothing, but a pipeline wants the same shapes as in training."""
    for batch, _ in batches.validation_batches(token_store(101).tokens, 10, 3, 1, 2):
        assert batch.samples.dtype == np.int64 and batch.samples.shape == (3,)


def evaluate(store, s, data_size, micro):
    """What the engines and the loop make of it: Σ (mean over ranks of Σ weights·loss) · tokens, and who predicted what."""
    nats, seen = 0.0, []
    for parts in zip(*(batches.validation_batches(store.tokens, s, micro, r, data_size) for r in range(data_size)), strict=True):
        (tokens,) = {count for _, count in parts}
        mean = np.mean([(batch.weights * np.float64(np.sin(batch.targets))).sum() for batch, _ in parts])
        nats += mean * tokens
        for batch, _ in parts:
            assert batch.ids.shape == batch.targets.shape == batch.weights.shape == (micro, s)
            assert (batch.ids[batch.weights == 0] == 0).all() and (batch.targets[batch.weights == 0] == 0).all()
            seen += zip(batch.ids[batch.weights > 0].tolist(), batch.targets[batch.weights > 0].tolist(), strict=True)
        assert sum((batch.weights > 0).sum() for batch, _ in parts) == tokens
    return nats, Counter(seen)


@pytest.mark.parametrize(("layout", "num_tokens"), list(itertools.product(LAYOUTS, [2, 10, 11, 12, 100, 101, 163])))
def test_validation_covers_every_token_once_on_every_layout(token_store, layout, num_tokens):
    nats, seen = evaluate(token_store(num_tokens), 10, *layout)
    assert seen == Counter((k, k + 1) for k in range(num_tokens - 1))
    assert nats == pytest.approx(np.sin(np.arange(1, num_tokens)).sum(), rel=1e-5, abs=1e-5)


def test_a_corpus_shorter_than_a_sequence_is_refused_for_training_with_both_numbers(token_store):
    with pytest.raises(Mistake, match=r"model.seq_length = 128 is longer .* 128 tokens → use model.seq_length = 127 or less"):
        list(batches.one_source(token_store(128), 128, BatchSizes(4), 1, seed=0).micro_batches(0, 0, 1))
    assert batches.num_samples(token_store(129, "longer"), 128) == 1


def test_an_uneven_batch_is_refused_with_what_would_work():
    with pytest.raises(Mistake, match=r"batch_size = 10 .*micro_batch_size = 2 × 2 data ranks → use 8 or 12"):
        batches.micro_batches_per_step(10, 2, 2)
    assert batches.micro_batches_per_step(12, 2, 2) == 3


def test_epochs(token_store):
    assert batches.epochs(token_store(101), 10, 25) == 2.5
