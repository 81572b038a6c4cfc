"""Best-fit packing: nothing is lost or cut without need, and the bins are those of the rule applied item by item."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data import packing
from research.data.packing import PackedDocuments, best_fit, pieces_of
from research.data.records import Cache, silent
from research.data.token_store import TokenStore, write

END = 9999


class Ends:
    """A tokenizer of which only end-of-text is asked."""

    end_of_text = END


def store_of(tmp_path, lengths: list[int], name: str = "docs") -> TokenStore:
    """Document i holds 100·i + 0, 1, 2, …, and ends in end-of-text."""
    documents = [np.append(100 * i + np.arange(length - 1), END) if length else np.zeros(0, int) for i, length in enumerate(lengths)]
    write(tmp_path / name, ((ids, 1) for ids in documents), 10_000, {"source_sha256": "0" * 64})
    return TokenStore(tmp_path / name)


def one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """The room left in each bin, ascending: best-fit decreasing as a textbook has it."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40).flatmap(lambda s: st.tuples(st.just(s), st.lists(st.integers(1, s), max_size=60))))
def test_bins_are_those_of_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    bins = best_fit(np.array(lengths, np.int64), capacity)
    assert sorted(bins.items.tolist()) == list(range(len(lengths)))
    sums = [sum(lengths[item] for item in bins.items[a:b]) for a, b in zip(bins.starts, bins.starts[1:], strict=False)]
    assert sorted(capacity - total for total in sums) == one_by_one(lengths, capacity)


def test_many_documents_of_few_lengths_are_packed_as_quickly_as_their_lengths() -> None:
    """A million items of 700 lengths; at most one bin in a thousand more than their sum needs."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1.2, 1_000_000).astype(np.int64) + 1, 2048)
    bins = best_fit(lengths, 2048)
    assert np.bincount(bins.items, minlength=len(lengths)).tolist() == [1] * len(lengths)
    assert np.add.reduceat(lengths[bins.items], bins.starts[:-1]).max() <= 2048
    assert len(bins.starts) - 1 <= 1.001 * lengths.sum() / 2048 + 1


def test_every_token_is_predicted_once_from_those_before_it_in_its_document(tmp_path) -> None:
    """Documents of 3, 0, 25 (longer than a row, so cut), 8, 1 and 9 tokens, in rows of 10."""
    lengths = [3, 0, 25, 8, 1, 9]
    store = store_of(tmp_path, lengths)
    packed = PackedDocuments(store, Ends(), 10, seed=1)
    numbers = np.arange(packed.size)
    rows = packed.rows(numbers, np.zeros_like(numbers))
    assert rows.counts is not None and rows.segments is not None
    seen: list[tuple[int, ...]] = []
    for ids, targets, counts, segments in zip(rows.ids, rows.targets, rows.counts, rows.segments, strict=True):
        for segment in np.unique(segments[counts]).tolist():
            here = segments == segment
            assert counts[here].all() and np.diff(np.flatnonzero(here)).max(initial=1) == 1
            assert ids[here][1:].tolist() == targets[here][:-1].tolist()
            seen.append((int(ids[here][0]), *targets[here].tolist()))
        assert not set(segments[counts]) & set(segments[~counts])
    pieces = [
        (END, 0, 1, END),
        (END, *range(200, 210)), (209, *range(210, 220)), (219, *range(220, 224), END),
        (END, *range(300, 307), END), (END, END), (END, *range(500, 508), END),
    ]  # fmt: skip
    assert sorted(seen) == sorted(pieces)
    assert packed.counted(numbers, numbers).tolist() == rows.counts.sum(1).tolist() and packed.num_cut == 1
    assert packed.fill == sum(lengths) / (packed.size * 10)
    for number in numbers.tolist():
        found = [token for start, stop in packed.stretches(number, 0) for token in store.tokens[start:stop].tolist()]
        assert found == rows.targets[number][rows.counts[number]].tolist()


def test_bins_are_kept_and_made_again_if_they_are_damaged(tmp_path, monkeypatch) -> None:
    store, calls = store_of(tmp_path, [3, 5, 4, 7, 2]), []
    cache = Cache(tmp_path / "cache", silent)
    cache.folder.mkdir()
    monkeypatch.setattr(packing, "best_fit", lambda *arguments: calls.append(1) or best_fit(*arguments))
    first, second = (PackedDocuments(store, Ends(), 8, 1, cache) for _ in range(2))
    numbers = np.arange(first.size)
    assert len(calls) == 1 and (first.rows(numbers, numbers).ids == second.rows(numbers, numbers).ids).all()
    PackedDocuments(store, Ends(), 9, 1, cache)
    assert len(calls) == 2
    (kept,) = cache.folder.glob("*-8-*.items.npy")
    kept.write_bytes(b"")
    third = PackedDocuments(store, Ends(), 8, 1, cache)
    assert len(calls) == 3 and (first.rows(numbers, numbers).ids == third.rows(numbers, numbers).ids).all()


@pytest.mark.parametrize("capacity", [1, 4, 7])
def test_pieces_hold_every_token_once(tmp_path, capacity: int) -> None:
    store = store_of(tmp_path, [4, 9, 0, 1, 8])
    pieces = pieces_of(store, capacity)
    places = [place for start, length in zip(pieces.starts, pieces.lengths, strict=True) for place in range(start, start + length)]
    assert places == list(range(store.num_tokens)) and pieces.lengths.max() <= capacity
    assert pieces.starts[pieces.begins].tolist() == [0, 4, 13, 14]
