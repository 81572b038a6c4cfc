"""Blending, as properties of random blends: exact counts per block, no sample lost or repeated, the same from any place and layout."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import Mistake
from research.config.batch_sizes import BatchSizes
from research.data import order
from research.data.batches import StreamSampler, one_source
from research.data.blend import BLOCK, Blend, Stage, apportioned

WEIGHTS = st.one_of(st.just(0.0), st.floats(0.02, 10.0))
LAYOUTS = [(1, 1), (1, 4), (2, 3), (4, 2), (3, 8)]
"""(data ranks, sequences of a micro-batch); a batch has 24 sequences."""


@st.composite
def blends(draw: st.DrawFn) -> Blend:
    """One to five sources, and one to three stages of up to two blocks, whose borders lie anywhere."""
    names = [f"source {i}" for i in range(draw(st.integers(1, 5)))]
    weights = st.lists(WEIGHTS, min_size=len(names), max_size=len(names)).filter(any)
    lengths = draw(st.lists(st.integers(1, 2 * BLOCK), min_size=0, max_size=2))
    firsts = [0, *np.cumsum(lengths).tolist()]
    return Blend(names, [Stage(first, tuple(draw(weights))) for first in firsts], draw(st.integers(0, 2**63)))


@given(blends())
@settings(max_examples=40, deadline=None)
def test_each_block_holds_each_source_in_proportion_and_every_sample_follows_the_one_before(blend: Blend) -> None:
    """Counted over the stages and a few blocks of the last one, in the order of the run."""
    end = blend.firsts[-1] + 2 * BLOCK + 100
    sources, numbers = blend.place(np.arange(end))
    for source in range(len(blend.names)):
        assert np.array_equal(numbers[sources == source], np.arange((sources == source).sum())), "a sample is lost or comes twice"
    for stage, (first, last) in enumerate(pairwise([*blend.firsts, end])):
        for begin in range(first, last - BLOCK + 1, BLOCK):
            assert np.array_equal(np.bincount(sources[begin : begin + BLOCK], minlength=len(blend.names)), blend.counts[stage])


@given(blends(), st.lists(st.integers(0, 6 * BLOCK), min_size=1, max_size=20))
@settings(max_examples=12, deadline=None)
def test_a_sample_s_place_depends_on_its_number_alone(blend: Blend, numbers: list[int]) -> None:
    """Asked alone, in any order, in a table, or by another object: after a resume, and on every rank."""
    whole = blend.place(np.arange(6 * BLOCK + 1))
    again = Blend(
        blend.names, [Stage(first, tuple(counts.tolist())) for first, counts in zip(blend.firsts, blend.counts, strict=True)], blend.seed
    )
    for asked in (blend, again):
        found = asked.place(np.array(numbers)[:, None])
        assert found.sources.shape == (len(numbers), 1)
        assert found.sources.ravel().tolist() == whole.sources[numbers].tolist()
        assert found.numbers.ravel().tolist() == whole.numbers[numbers].tolist()
    for number in numbers[:3]:
        assert np.array_equal(blend.before(number), np.bincount(whole.sources[:number], minlength=len(blend.names)))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(1, 5000))
def test_apportioning_is_by_the_largest_remainder(weights: list[int], total: int) -> None:
    """Every count is its quota rounded down or up, they add up, and nobody who was rounded up had a smaller remainder than who was not."""
    quotas = [Fraction(weight * total, sum(weights)) for weight in weights]
    if min(quotas) < 1:
        return
    counts = apportioned([str(i) for i in range(len(weights))], weights, total).tolist()
    assert sum(counts) == total and all(int(quota) <= count <= int(quota) + 1 for quota, count in zip(quotas, counts, strict=True))
    up = [quota - count + 1 for quota, count in zip(quotas, counts, strict=True) if count > quota]
    down = [quota - count for quota, count in zip(quotas, counts, strict=True) if count <= quota]
    assert not up or not down or min(up) >= max(down)


def test_shares_that_divide_a_block_are_exact() -> None:
    assert apportioned("abc", (0.5, 0.25, 0.25), BLOCK).tolist() == [1024, 512, 512]
    assert apportioned("ab", (3, 1), BLOCK).tolist() == [1536, 512]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((1.0, -0.5), "the weight -0.5 of 'b' is no weight → use 0 or more"),
        ((1.0, float("nan")), "the weight nan of 'b' is no weight"),
        ((0.0, 0.0), "the weights of all 2 sources are 0 → give one of them a weight"),
        ((1.0, 0.0001), "the weight 0.0001 of 'b' is less than one sample of 2,048, which is 0.00049 with these weights → give it more"),
    ],
)
def test_weights_that_do_not_work_are_a_sentence(weights: tuple[float, ...], said: str) -> None:
    with pytest.raises(Mistake, match=said.replace(".", r"\.")):
        Blend("ab", [Stage(0, weights)], 0)


@given(st.integers(1, 400), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_the_order_of_an_epoch_is_a_bijection(n: int, seed: int) -> None:
    assert sorted(order.sample(np.arange(3 * n, 4 * n), n, seed)) == list(range(n))


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**5), st.integers(0, 2**64 - 1)), min_size=1, max_size=20))
@settings(max_examples=15, deadline=None)
def test_orders_of_several_sizes_at_once_are_those_of_each_alone(asked: list[tuple[int, int, int]]) -> None:
    i, n, seed = (np.array(column, dtype) for column, dtype in zip(zip(*asked, strict=True), (np.int64, np.int64, np.uint64), strict=True))
    assert order.sample(i, n, seed).tolist() == [order.sample(*each) for each in asked]


def test_a_blend_of_stores_gives_the_same_steps_on_every_layout(token_store) -> None:
    """Each sample is a window of the store that the blend names, and is read in its source's own order."""
    stores = [token_store(1001, "a"), token_store(401, "b")]
    blend = Blend(["a", "b"], [Stage(0, (3.0, 1.0)), Stage(24 * 2, (0.0, 1.0))], seed=5)
    for step in (0, 1, 2, 341):  # the last one lies in two spans
        steps = []
        for data_size, micro in LAYOUTS:
            sampler = StreamSampler(stores, blend, 10, BatchSizes(24), micro, seed=5)
            found = [batch for rank in range(data_size) for batch in sampler.micro_batches(step, rank, data_size)]
            rows = sorted(
                (int(n), ids.tolist(), targets.tolist()) for b in found for n, ids, targets in zip(b.samples, b.ids, b.targets, strict=True)
            )
            assert [n for n, _, _ in rows] == list(range(24 * step, 24 * step + 24))
            steps.append(rows)
        assert all(rows == steps[0] for rows in steps)
        sources, windows, _ = sampler.locate(np.arange(24 * step, 24 * step + 24))
        for (_, ids, targets), source, window in zip(steps[0], sources.tolist(), windows.tolist(), strict=True):
            expected = stores[source].tokens[10 * window : 10 * window + 11].tolist()
            assert (ids, targets) == (expected[:-1], expected[1:])
    assert set(sources.tolist()) == {1}, "from the second stage on, only b is read"


def test_an_epoch_of_each_source_is_every_window_once(token_store) -> None:
    stores = [token_store(301, "a"), token_store(201, "b")]
    sampler = StreamSampler(stores, Blend(["a", "b"], [Stage(0, (1.0, 1.0))], seed=5), 10, BatchSizes(24), 1, seed=5)
    sources, windows, _ = sampler.locate(np.arange(500))
    for source, size in ((0, 30), (1, 20)):
        assert sorted(windows[sources == source][:size].tolist()) == list(range(size))
        assert sampler.epochs(500)[source] == pytest.approx((sources == source).sum() / size)


def test_a_source_keeps_its_order_when_others_are_added(token_store) -> None:
    a, b, c = (token_store(501, name) for name in "abc")

    def order_of(names: str, stores: list, weights: tuple[float, ...]) -> list[int]:
        sampler = StreamSampler(stores, Blend(names, [Stage(0, weights)], seed=5), 10, BatchSizes(24), 1, seed=5)
        sources, windows, _ = sampler.locate(np.arange(400))
        return windows[sources == names.index("a")][:50].tolist()

    assert order_of("ab", [a, b], (1.0, 1.0)) == order_of("cab", [c, a, b], (1.0, 2.0, 1.0))


def test_the_only_source_is_read_as_before_there_were_blends(token_store) -> None:
    located = one_source(token_store(1001, "a"), 10, BatchSizes(24), 1, seed=7).locate(np.arange(5000))
    assert located.windows.tolist() == order.sample(np.arange(5000), 100, 7).tolist()


def test_a_window_names_the_tokens_of_a_sample_and_its_epoch(token_store):
    """The epoch is counted here: how often the same window of the same source came before. Ids tell source and position."""
    stores = [token_store(first, f"store {first}") for first in (101, 58, 333)]
    sampler = StreamSampler(stores, Blend("abc", [Stage(0, (0.5, 0.3, 0.2)), Stage(2500, (0.1, 0.1, 0.8))], 3), 10, BatchSizes(8), 4, 3)
    sources, windows, _ = sampler.locate(np.arange(5000))
    for sample in (0, 7, 8, 2047, 2048, 2499, 2500, 4999):
        window = sampler.windows(sample)[0]
        assert sample in sampler.samples(sample // 8) and len(sampler.samples(3)) == 8
        assert (window.sample, window.store) == (sample, stores[sources[sample]])
        earlier = (sources[:sample] == sources[sample]) & (windows[:sample] == windows[sample])
        assert (window.number, window.epoch) == (windows[sample], earlier.sum())
        (batch,) = [batch for batch in sampler.micro_batches(sample // 8, 0, 1) if sample in batch.samples]
        row = batch.samples.tolist().index(sample)
        assert [*batch.ids[row], batch.targets[row, -1]] == window.store.tokens[window.start : window.stop].tolist()
