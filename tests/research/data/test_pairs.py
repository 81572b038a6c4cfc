"""Pairs as samples: rows are the pairs, each is in one sample or counted as left out, and both classes learn the same targets."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from parallel.errors import Mistake
from research.config.examples import Pairs, Supervised, check_examples, kinds_for
from research.data import tokenizer
from research.data.mask_store import MaskWriter
from research.data.packing import best_fit_of_two
from research.data.pairs import JoinedPairs, PairExamples
from research.data.supervised import SupervisedExamples
from research.data.token_store import StoreWriter, TokenStore
from tests.research.helpers.example import sentence

BYTES = tokenizer.fixed("builtin:bytes+sep")
SEP, END = 257, BYTES.end_of_text
SIDE = st.lists(st.integers(0, 255), min_size=1, max_size=11)
PAIRS = st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=30)
LENGTHS = {"source_length": st.integers(2, 24), "seq_length": st.integers(2, 24)}
QUICK = given_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def store_of(folder, pairs, name="pairs") -> TokenStore:
    """A store with the mask of `prepare --pairs`."""
    with StoreWriter(folder / name, BYTES.vocab_size, {}) as writer, MaskWriter(folder / name, writer.facts) as masks:
        for source, target in pairs:
            ids = [*source, SEP, *target, END]
            writer.add(np.array(ids), len(ids))
            mask = [0] * (len(source) + 1) + [1] * (len(target) + 1)
            masks.add_documents(np.array(mask, np.uint8), np.array([len(ids)]))
    return TokenStore(folder / name)


def of_segments(columns, segments):
    """What the columns hold in each segment, in order of the segments; padding must come last."""
    there = [number for number in segments if number >= 0]
    assert list(segments[: len(there)]) == sorted(there) and set(there) == set(range(len(set(there))))
    return [tuple([column[i] for i in range(len(there)) if segments[i] == one] for column in columns) for one in sorted(set(there))]


@QUICK
@given(pairs=PAIRS, data=st.data(), **LENGTHS)
def test_rows_of_an_encoder_decoder_are_the_pairs(tmp_path, pairs, data, source_length, seq_length):
    store = store_of(tmp_path, pairs)
    expected = sorted(pair for pair in pairs if len(pair[0]) < source_length and len(pair[1]) < seq_length)
    if not expected:
        assert "has room in" in sentence(lambda: PairExamples(store, BYTES, seq_length, 0, source_length=source_length))
        return
    found = PairExamples(store, BYTES, seq_length, 0, source_length=source_length)
    numbers = np.array(data.draw(st.permutations(range(found.size))))
    rows, counted = found.rows(numbers, 0 * numbers), found.counted(numbers, 0 * numbers)
    assert rows.ids.shape == rows.segments.shape == (found.size, source_length + seq_length)
    assert rows.targets.shape == rows.counts.shape == (found.size, seq_length)
    seen = []
    for row, number in enumerate(numbers.tolist()):
        ids, segments, targets, counts = (column[row].tolist() for column in (rows.ids, rows.segments, rows.targets, rows.counts))
        sources = of_segments([ids[:source_length]], segments[:source_length])
        read = of_segments([ids[source_length:], targets], segments[source_length:])
        assert counts == [segment >= 0 for segment in segments[source_length:]] and counted[row] == sum(counts)
        assert all(token == END for token, segment in zip(ids, segments, strict=True) if segment < 0)
        for (source,), (decoder, target), (start, stop) in zip(sources, read, found.stretches(number, 0), strict=True):
            assert source[-1] == SEP == decoder[0] and decoder[1:] == target[:-1] and target[-1] == END
            seen.append((source[:-1], target[:-1]))
            assert store.tokens[start:stop].tolist() == [*source, *target]
    assert sorted(seen) == expected and found.num_left_out == len(pairs) - len(expected)


@QUICK
@given(pairs=PAIRS, data=st.data(), seq_length=st.integers(4, 40))
def test_rows_of_a_decoder_are_the_pairs(tmp_path, pairs, data, seq_length):
    store = store_of(tmp_path, pairs)
    expected = sorted(pair for pair in pairs if len(pair[0]) + len(pair[1]) + 1 <= seq_length)
    if not expected:
        assert "has room in" in sentence(lambda: JoinedPairs(store, BYTES, seq_length, 0))
        return
    found = JoinedPairs(store, BYTES, seq_length, 0)
    numbers = np.array(data.draw(st.permutations(range(found.size))))
    rows, counted = found.rows(numbers, 0 * numbers), found.counted(numbers, 0 * numbers)
    assert rows.ids.shape == rows.segments.shape == rows.targets.shape == rows.counts.shape == (found.size, seq_length)
    seen = []
    for row, number in enumerate(numbers.tolist()):
        ids, segments, targets, counts = (column[row].tolist() for column in (rows.ids, rows.segments, rows.targets, rows.counts))
        assert counted[row] == sum(counts)
        parts = of_segments([ids, targets, counts], segments)
        for (read, target, counts_here), (start, stop) in zip(parts, found.stretches(number, 0), strict=True):
            whole = [*read, target[-1]]
            assert target == whole[1:] and whole[-1] == END and store.tokens[start:stop].tolist() == whole
            place = whole.index(SEP)
            assert counts_here == [i >= place for i in range(len(read))]
            seen.append((whole[:place], whole[place + 1 : -1]))
        assert not any(count for count, segment in zip(counts, segments, strict=True) if segment < 0)
    assert sorted(seen) == expected and found.num_left_out == len(pairs) - len(expected)


def test_a_decoder_learns_what_supervised_examples_of_the_same_store_learn(tmp_path):
    """The mask that `prepare --pairs` writes says the same as the separators. Nothing is too long, so nothing is truncated."""
    generator = np.random.default_rng(0)
    pairs = [tuple(generator.integers(0, 256, generator.integers(1, 9)).tolist() for _ in range(2)) for _ in range(200)]
    store = store_of(tmp_path, pairs)
    ours, theirs = JoinedPairs(store, BYTES, 40, 0), SupervisedExamples(store, BYTES, 40, 0, train_on="responses")
    numbers = np.arange(ours.size)
    assert ours.size == theirs.size
    for one, other in zip(ours.rows(numbers, numbers)[:4], theirs.rows(numbers, numbers)[:4], strict=True):
        assert (one == other).all()


def test_both_models_learn_the_same_targets(tmp_path):
    pairs = [([i] * (1 + i % 5), [i, *range(i % 7)]) for i in range(100)]
    store = store_of(tmp_path, pairs)
    found = [PairExamples(store, BYTES, 20, 0, source_length=16), JoinedPairs(store, BYTES, 36, 0)]
    targets = []
    for one in found:
        rows = one.rows(np.arange(one.size), np.zeros(one.size, np.int64))
        targets.append(np.sort(rows.targets[rows.counts]))
    assert (targets[0] == targets[1]).all() and one.counted(np.arange(one.size), np.arange(one.size)).sum() == len(targets[0])


@QUICK
@given(
    items=st.lists(st.tuples(st.integers(1, 17), st.integers(1, 9)), max_size=60),
)
def test_bins_of_two_lengths_hold_each_item_once(items):
    firsts, seconds = (np.array(column, np.int64) for column in zip(*items, strict=True)) if items else (np.zeros(0, np.int64),) * 2
    bins = best_fit_of_two(firsts, seconds, 17, 9)
    assert sorted(bins.items.tolist()) == list(range(len(items))) and (bins.starts[0], bins.starts[-1]) == (0, len(items))
    for begin, end in zip(bins.starts[:-1], bins.starts[1:], strict=True):
        inside = bins.items[begin:end]
        assert len(inside) and firsts[inside].sum() <= 17 and seconds[inside].sum() <= 9


def test_bins_of_two_lengths_are_the_fullest_that_have_room():
    """By hand, capacities 10 and 10: the third item has room in both bins, and the first is fuller; the fourth has room in the second."""
    bins = best_fit_of_two(np.array([7, 6, 2, 3, 9]), np.array([2, 2, 1, 8, 9]), 10, 10)
    assert [bins.items[a:b].tolist() for a, b in zip(bins.starts[:-1], bins.starts[1:], strict=True)] == [[0, 2], [1, 3], [4]]
    generator = np.random.default_rng(1)
    lengths = generator.integers(1, 40, (2, 5000))
    bound = lengths.sum(1).max() / 64
    assert len(best_fit_of_two(*lengths, 64, 64).starts) - 1 < 1.25 * bound


def test_the_summary_counts_what_is_left_out(tmp_path):
    store = store_of(tmp_path, [([1] * 9, [2]), ([1], [2] * 9), ([1] * 9, [2] * 9), ([1], [2])])
    assert PairExamples(store, BYTES, 8, 0, source_length=8).summary == (
        "4 pairs in 1 samples, 25.0 % of the sources' places used, 25.0 % of the targets' · 2 tokens of targets count · 3 pairs left out: "
        "2 with a source of more than 8 tokens and 2 with a target of more than 8 tokens"
    )
    assert JoinedPairs(store, BYTES, 12, 0).summary == (
        "4 pairs in 3 samples, 69.4 % of their places used · 14 tokens of targets count · 1 pairs left out: "
        "longer than model.seq_length + 1 = 13 tokens"
    )
    assert "left out" not in JoinedPairs(store, BYTES, 40, 0).summary


def test_what_is_no_pair_is_refused(tmp_path):
    with StoreWriter(tmp_path / "text", BYTES.vocab_size, {}) as writer:
        for ids in ([1, 2, END], [1, SEP, 2, END], [SEP, 2, END], [1, SEP], [1, SEP, END], [1, SEP, 2]):
            writer.add(np.array(ids), len(ids))
    text = sentence(lambda: JoinedPairs(TokenStore(tmp_path / "text"), BYTES, 8, 0))
    assert text.startswith("4 of the 6 documents of text are not a source, <sep>, a target and end-of-text → use a .jsonl with lines of")
    store = store_of(tmp_path, [([1], [2])])
    text = sentence(lambda: PairExamples(store, BYTES, 8, 0, source_length=8, separator="<to>"))
    assert text.startswith("pairs need the special token '<to>', which the tokenizer builtin:bytes+sep does not have")
    assert "none of the 1 pairs of pairs has room in model.seq_length + 1 = 3 tokens" in sentence(lambda: JoinedPairs(store, BYTES, 2, 0))
    part = store_of(tmp_path, [([1], [2]), ([3], [4]), ([5], [6])], "parts").part(1, 3)
    rows = JoinedPairs(part, BYTES, 6, 0).rows(np.arange(1), np.arange(1))
    assert rows.ids.tolist() == [[3, SEP, 4, 5, SEP, 6]] and rows.targets.tolist() == [[SEP, 4, END, SEP, 6, END]]


def test_the_settings():
    assert Pairs().options == {"separator": "<sep>"} and Pairs().confines and kinds_for(Pairs()) == ("gpt", "t5")
    assert check_examples({"kind": "pairs", "separator": "<to>"}) == Pairs(separator="<to>")
    assert kinds_for(Supervised(train_on="all")) == ("gpt",)
    with pytest.raises(Mistake):
        Pairs(separators="x")
