"""Whole documents packed into samples: best-fit decreasing (arXiv:2404.10830), computed once and kept in data.cache.

The bins depend on the lengths of the documents and on the length of a sample alone, so they are the same on every layout.
"""

import bisect
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parallel.files import locked, published
from research.data.examples import Rows
from research.data.records import Cache
from research.data.token_store import TokenStore
from research.data.tokenizer import Tokenizer

RECIPE = 1
"""Part of the name of kept bins. Raise it whenever the same lengths would give other bins."""
OPEN = 256
"""Bins of two lengths that are open at a time."""


class Bins(NamedTuple):
    """Which items lie in which bin: bin i holds items[starts[i] : starts[i + 1]], in the order in which they are placed."""

    items: np.ndarray  # int64: each number in [0, number of lengths) once
    starts: np.ndarray  # int64: 'bins + 1'


def best_fit(lengths: np.ndarray, capacity: int) -> Bins:
    """Best-fit decreasing: the longest item first, each into the fullest bin that has room, or into a new one.

    lengths: each in [1, capacity]. Items of one length are placed together, and bins of equal content are kept as one kind with its number
    (arXiv:2107.02027), so the time hardly grows with the number of items. Equal lengths are placed in the order of their numbers.
    """
    by_length = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    kinds: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    """Room left -> (lengths in the bin, number of such bins)."""
    rooms: list[int] = []
    """The keys of `kinds`, ascending."""

    def put(content: tuple[int, ...], number: int, room: int) -> None:
        if room not in kinds:
            bisect.insort(rooms, room)
            kinds[room] = []
        kinds[room].append((content, number))

    for length, left in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            place = bisect.bisect_left(rooms, length)
            is_new = place == len(rooms)
            room = capacity if is_new else rooms[place]
            content, number = ((), left) if is_new else kinds[room].pop()
            fits = min(room // length, left)  # that many go into one bin before the next, which is less full
            taken = min(number, left // fits)
            if not is_new and taken < number:
                kinds[room].append((content, number - taken))
            elif not is_new and not kinds[room]:
                del kinds[room], rooms[place]
            put(content + (length,) * fits, taken, room - fits * length)
            left -= fits * taken

    # give each place of each bin an item of its length
    firsts = dict(zip(values[::-1].tolist(), (np.cumsum(counts[::-1]) - counts[::-1]).tolist(), strict=True))
    items, sizes = [], []
    for room in rooms:
        for content, number in kinds[room]:
            columns = []
            for length in content:
                first = firsts[length]
                columns.append(by_length[first : first + number])
                firsts[length] = first + number
            items.append(np.stack(columns, axis=1).ravel())
            sizes.append(np.full(number, len(content), np.int64))
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(sizes) if sizes else np.zeros(0, np.int64))])
    return Bins(np.concatenate(items).astype(np.int64) if items else np.zeros(0, np.int64), starts)


def best_fit_of_two(firsts: np.ndarray, seconds: np.ndarray, first_capacity: int, second_capacity: int) -> Bins:
    """Best fit of items with two lengths, such as a source and a target, into bins that have room for each of them.

    firsts: each in [1, first_capacity]; seconds: each in [1, second_capacity]. In their order, the items go into the bin that is then
    fullest, the shares of both rooms added, or into a new one. At most OPEN bins are open, so the time grows with the number of items only:
    for a new bin, the fullest one is closed. (Decreasing items would close bins before the small ones come.)
    """
    sizes = np.stack([firsts * second_capacity, seconds * first_capacity])  # in shares of the product, as whole numbers
    capacity = first_capacity * second_capacity
    rooms, bins = np.zeros((2, OPEN), np.int64), np.zeros(OPEN, np.int64)
    numbers, count = np.zeros(len(firsts), np.int64), 0
    for item in range(len(firsts)):
        left = rooms - sizes[:, item, None]
        total = np.where(left.min(0) >= 0, left.sum(0), 2 * capacity)
        place = int(total.argmin())
        if total[place] == 2 * capacity:  # none has room
            place = int(rooms.sum(0).argmin())
            rooms[:, place], bins[place] = capacity, count
            count += 1
        rooms[:, place] -= sizes[:, item]
        numbers[item] = bins[place]
    items = np.argsort(numbers, kind="stable")
    return Bins(items, np.searchsorted(numbers[items], np.arange(count + 1)))


class Pieces(NamedTuple):
    """The documents of a store, those longer than a sample cut into pieces of its length. Arrays of one length, in the store's order."""

    starts: np.ndarray  # int64: where in the store each piece begins
    lengths: np.ndarray  # int64: its tokens
    begins: np.ndarray  # bool: whether it is the beginning of a document


def pieces_of(store: TokenStore, capacity: int) -> Pieces:
    """Every token of the store in one piece. Documents without a token have none."""
    offsets = store.document_offsets()
    lengths = np.diff(offsets)
    counts = -(-lengths // capacity)
    documents = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = offsets[documents] + number * capacity
    return Pieces(starts, np.minimum(capacity, offsets[documents + 1] - starts), number == 0)


class PackedDocuments:
    """Samples are bins of whole documents; none is cut unless it is longer than a sample.

    A document of n tokens, end-of-text included, takes n places: each of its tokens is predicted from those before it, and the first one
    from an end-of-text, as in ConfinedStream. What is left of a row does not count.
    """

    confines = True

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, seq_length: int, seed: int, cache: Cache | None = None) -> None:
        """`cache`: where the bins are kept; None: they are computed now."""
        self.store, self.seq_length, self.end_of_text = store, seq_length, tokenizer.end_of_text
        self.pieces = pieces_of(store, seq_length)
        bins = best_fit(self.pieces.lengths, seq_length) if cache is None else kept_bins(store, self.pieces, seq_length, cache)
        self._items, self._starts = bins
        self.size = len(bins.starts) - 1
        self._used = np.add.reduceat(self.pieces.lengths[bins.items], bins.starts[:-1]) if self.size else np.zeros(0, np.int64)

    @property
    def fill(self) -> float:
        """The share of the places of all samples that hold a token."""
        return float(self.pieces.lengths.sum() / max(1, self.size * self.seq_length))

    @property
    def num_cut(self) -> int:
        """The number of documents that are longer than a sample."""
        return int(np.count_nonzero(np.diff(self.store.document_offsets()) > self.seq_length))

    @property
    def summary(self) -> str:
        """What an epoch holds, for the beginning of a run."""
        words = [f"{self.store.num_documents:,} documents in {self.size:,} samples, {100 * self.fill:.1f} % of their places used"]
        if self.num_cut:
            words.append(f"{self.num_cut:,} longer than model.seq_length = {self.seq_length} tokens, cut into pieces")
        return " · ".join(words)

    def rows(self, numbers: np.ndarray, epochs: np.ndarray) -> Rows:
        """As in Examples: the same in every epoch."""
        first = self._starts[numbers]
        sizes = self._starts[numbers + 1] - first  # documents of each row
        items = self._items[ranges(first, sizes)]
        lengths, used = self.pieces.lengths[items], self._used[numbers]
        tokens = ranges(self.pieces.starts[items], lengths)  # of all rows, one after the other
        places = ranges(np.arange(len(numbers)) * self.seq_length, used)  # where they go, in the rows one after the other
        ids = self.store.tokens.take(tokens - 1, mode="clip")
        ids[(np.cumsum(lengths) - lengths)[self.pieces.begins[items]]] = self.end_of_text
        shape = len(numbers), self.seq_length
        rows = Rows(
            np.full(shape, self.end_of_text, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool), np.full(shape, -1, np.int64)
        )
        assert rows.counts is not None and rows.segments is not None
        rows.ids.flat[places], rows.targets.flat[places], rows.counts.flat[places] = ids, self.store.tokens[tokens], True
        rows.segments.flat[places] = np.repeat(ranges(np.zeros(len(sizes), np.int64), sizes), lengths)
        return rows

    def counted(self, numbers: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """As in Examples: the tokens of the bin."""
        return self._used[numbers]

    def stretches(self, number: int, epoch: int) -> list[tuple[int, int]]:
        """As in Examples: the documents of the bin."""
        starts, lengths = self.pieces.starts, self.pieces.lengths
        return [(int(starts[item]), int(starts[item] + lengths[item])) for item in self._items_of(number)]

    def _items_of(self, number: int) -> Iterator[int]:
        yield from self._items[self._starts[number] : self._starts[number + 1]].tolist()


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers starts[0], starts[0] + 1, … of which there are lengths[0], then those of starts[1], and so on."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def kept_bins(store: TokenStore, pieces: Pieces, seq_length: int, cache: Cache) -> Bins:
    """The bins of a store from data.cache, or computed now by one of all processes that ask, and kept there."""
    prefix = cache.folder / f"bins-{store.facts['source_sha256'][:16]}-{store.num_tokens}-{seq_length}-v{RECIPE}"
    what = f"packing {store.num_documents:,} documents"
    if (found := _read(prefix, len(pieces.lengths))) is not None:
        return found
    with locked(Path(f"{prefix}.lock"), functools.partial(cache.waiting, what)):
        if (found := _read(prefix, len(pieces.lengths))) is not None:
            return found
        with cache.progress(what):
            bins = best_fit(pieces.lengths, seq_length)
        for name, array in zip(Bins._fields, bins, strict=True):  # the last one appears last
            with published(Path(f"{prefix}.{name}.npy")) as temporary, open(temporary, "wb") as file:
                np.save(file, array)
    return bins


def _read(prefix: Path, items: int) -> Bins | None:
    """The bins under this name, mapped; None if there are none, or if they are damaged."""
    try:
        bins = Bins(*(np.load(f"{prefix}.{name}.npy", mmap_mode="r") for name in Bins._fields))
    except (OSError, ValueError, EOFError):
        return None
    return bins if len(bins.items) == items and len(bins.starts) and bins.starts[-1] == items else None
