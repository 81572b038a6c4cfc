"""What a token store holds: the documents that a stretch of tokens touches, the lengths of its documents, the texts of some.

Everything is read in pieces, so memory stays bounded however long the store is.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parallel.regular_files import read_regular
from research.data.stores import without
from research.data.token_store import TokenStore
from research.data.tokenizer import TOKENS_PER_CHARACTER, Tokenizer
from research.data.tokenizer_file import FILE, LARGEST

DOCUMENTS = 1 << 20
"""Documents whose lengths are looked at at a time."""
CACHED = re.compile(r"builtin:([a-z]+(?:-\d+)?)")
"""A built-in tokenizer; the group is what its file in data.cache begins with, if it was made from a text."""


class Extract(NamedTuple):
    """The part of a document that lies in a stretch of tokens."""

    document: int
    """Of the store, counted from 0."""
    offset: int
    """Where in the document it begins, in tokens."""
    start: int
    """Where in the store it begins, in tokens."""
    tokens: int


@dataclass(frozen=True)
class Lengths:
    """How many documents have how many tokens: `counts[i]` have `values[i]`, which ascend.

    A store of n tokens has at most √(2n) + 1 different lengths, so this is small however many documents there are.
    """

    values: np.ndarray
    counts: np.ndarray

    @property
    def median(self) -> float:
        """Of an even number of documents, the mean of the two in the middle."""
        ends = np.cumsum(self.counts)
        middle = np.searchsorted(ends, [(ends[-1] - 1) // 2, ends[-1] // 2], side="right")
        return float(self.values[middle].mean())

    def histogram(self) -> list[tuple[int, int, int]]:
        """(fewest tokens, most tokens, documents) from the shortest document to the longest: 0, 1, 2–3, 4–7, 8–15, …"""
        _, bits = np.frexp(self.values)  # 2^(bits - 1) <= length < 2^bits
        totals = [int(self.counts[bits == one].sum()) for one in range(int(bits[-1]) + 1)]
        return [((1 << one) >> 1, (1 << one) - 1, totals[one]) for one in range(int(bits[0]), len(totals))]


def extracts(store: TokenStore, start: int, stop: int) -> Iterator[Extract]:
    """The documents that tokens[start:stop] touches, in order."""
    first, last = store.document_at(start), store.document_at(stop - 1)
    offsets = store.document_offsets(first, last + 1)
    for document in np.flatnonzero(np.diff(offsets)):  # an empty document has no token here
        begin, end = (int(offset) for offset in offsets[document : document + 2])
        here = max(begin, start)
        yield Extract(first + int(document), here - begin, here, min(end, stop) - here)


def document_lengths(store: TokenStore) -> Lengths:
    """The lengths of all documents, in tokens. Reads the whole index; a Mistake if it is not in order."""
    store.index.check_order()
    values = counts = np.zeros(0, np.int64)
    for first in range(0, store.num_documents, DOCUMENTS):
        offsets = store.document_offsets(first, min(first + DOCUMENTS, store.num_documents))
        new, new_counts = np.unique(np.diff(offsets), return_counts=True)
        values, places = np.unique(np.concatenate([values, new]), return_inverse=True)
        counts = np.bincount(places, weights=np.concatenate([counts, new_counts])).astype(np.int64)  # exact below 2^53
    return Lengths(values, counts)


def evenly_spaced(store: TokenStore, count: int) -> list[int]:
    """The numbers of `count` documents, the first and the last among them; of all, if there are no more."""
    return np.unique(np.linspace(0, store.num_documents - 1, min(count, store.num_documents)).round().astype(np.int64)).tolist()


def beginning(store: TokenStore, extract: Extract, tokenizer: Tokenizer, characters: int) -> str:
    """The first characters of the text of an extract, without its end-of-text."""
    ids = store.tokens[extract.start : extract.start + min(extract.tokens, characters * TOKENS_PER_CHARACTER)]
    return tokenizer.decode(without(ids, tokenizer.end_of_text))[:characters]


def tokenizer_beside(store: TokenStore) -> Path | None:
    """The file of the tokenizer beside the store: tokenizer.json, or in data.cache the one whose SHA-256 the sidecar has."""
    folder = store.prefix.parent
    if (folder / FILE).is_file():
        return folder / FILE
    named = CACHED.fullmatch(str(store.facts.get("tokenizer")))
    for path in sorted(folder.glob(f"{named[1]}-*.json")) if named else ():
        if sha256_of_tokenizer(path) == store.facts.get("tokenizer_sha256"):
            return path
    return None


def sha256_of_tokenizer(path: Path) -> str:
    """SHA-256 (hex) of a tokenizer's file, which is the fingerprint of a tokenizer that was made from a text."""
    return hashlib.sha256(read_regular(path, LARGEST)).hexdigest()
