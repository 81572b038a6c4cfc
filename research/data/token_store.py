"""Token store: a split's token ids as one memory-mapped stream, in Megatron-LM's .bin/.idx format (research/data/megatron_index.py).

PREFIX.json, beside PREFIX.bin and PREFIX.idx, is not part of that format. Stores that are written here have it: where the ids came from,
how many documents, tokens and UTF-8 bytes of text there are (for bits per byte), the largest id, and both SHA-256.
"""

import contextlib
import copy
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from parallel.errors import Mistake
from parallel.files import published, read_json
from research.data.megatron_index import AT_OPENING, CHUNK, HEADER, MAGIC, MegatronIndex, file_of

SHORT_VOCABULARY = 65500
"""Below this many tokens an id is stored as uint16, else as int32: Megatron-LM's rule."""
CODES = {"<u2": 8, "<i4": 4}
"""Type codes of what is written here, which mean the same to every reader but DeepSpeed's own."""
LONGEST = 2**31 - 1
WRITTEN_AT_ONCE = 1 << 20
"""Bytes of the stream that reach the kernel in one piece. Linux then keeps them in large pages, which random reads find faster."""
COUNTS = ("documents", "tokens")
KINDS = {**dict.fromkeys((*COUNTS, "bytes", "max_id"), int), **dict.fromkeys(("bin_sha256", "idx_sha256", "tokenizer_sha256"), str)}
"""What PREFIX.json says, where it does."""
OF_VIEWS = ("first_document", "first_token")
"""Facts of a part of a store. No PREFIX.json has them."""


class TokenStore:
    """The tokens of documents, read-only, as they lie on disk one after the other. Opening reads a few pages, however long the store is.

    Where Tessera or Megatron-LM's --append-eod has written the store, each document ends in end-of-text.
    """

    def __init__(self, prefix: Path):
        self.prefix = Path(prefix)
        self.index = MegatronIndex(prefix)
        self._first = 0
        self.num_documents = self.index.num_documents
        self.num_tokens = self.index.num_tokens
        """Tokens of the stream, end-of-text included."""
        self.tokens: np.ndarray = np.memmap(self.index.stream, self.index.dtype, mode="r").view(np.ndarray)
        self.facts = self._sidecar()
        """What is known of the store: the content of PREFIX.json, or {} if there is none or it is not that of these files."""

    def __repr__(self) -> str:
        return f"TokenStore({self.prefix.name}: {self.num_documents:,} documents, {self.num_tokens:,} tokens)"

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text; end-of-text is not counted."""
        if "bytes" not in self.facts:
            path = file_of(self.prefix, ".json")
            raise Mistake(f"{path} is missing or broken: bits per byte needs its count of bytes → prepare the store again")
        return int(self.facts["bytes"])

    def document_offsets(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """int64: document k is tokens[offsets[k] : offsets[k + 1]]. The offsets of documents `first` to `last`, of all if None."""
        last = self.num_documents if last is None else last
        if self.num_documents == 1:  # perhaps a piece of the document
            return np.array([0, self.num_tokens])[first : last + 1]
        origin = self.index.document_offsets(self._first, self._first)[0]
        return self.index.document_offsets(self._first + first, self._first + last) - origin

    def documents(self) -> Iterator[tuple[int, int]]:
        """(first token, end) of each document, in order. Reads the index in pieces."""
        for first in range(0, self.num_documents, AT_OPENING):
            yield from pairwise(self.document_offsets(first, min(first + AT_OPENING, self.num_documents)).tolist())

    def document_at(self, position: int) -> int:
        """The document that holds the token at `position`, found in O(log documents)."""
        low, high = 0, self.num_documents
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.document_offsets(middle, middle)[0] <= position else (low, middle)
        return low

    def part(self, first: int, last: int) -> "TokenStore":
        """A view of documents `first` to `last` (excluded): a store with the same files, whose `facts` have no count of bytes."""
        begin, end = (int(self.document_offsets(document, document)[0]) for document in (first, last))
        view = copy.copy(self)
        view._first, view.num_documents = self._first + first, last - first
        view.tokens, view.num_tokens = self.tokens[begin:end], end - begin
        view.facts = self.facts | {"first_document": view._first, "documents": view.num_documents, "tokens": view.num_tokens}
        view.facts.pop("bytes", None)
        return view

    def piece(self, begin: int, end: int) -> "TokenStore":
        """A view of tokens `begin` to `end` (excluded) of a store of one document, as `part` is one of documents."""
        view = copy.copy(self)
        view.tokens, view.num_tokens = self.tokens[begin:end], end - begin
        view.facts = self.facts | {"first_document": self._first, "first_token": begin, "tokens": view.num_tokens}
        view.facts.pop("bytes", None)
        return view

    def read(self) -> dict[str, Any]:
        """The smallest and largest id and the SHA-256 of both files. Reads them whole; a Mistake if the index is not in order."""
        self.index.check_order()
        smallest, largest, sha256 = 0, -1, hashlib.sha256()
        with self.index.stream.open("rb") as file:
            while piece := file.read(CHUNK * self.index.dtype.itemsize):
                sha256.update(piece)
                ids = np.frombuffer(piece, self.index.dtype)
                smallest, largest = min(smallest, int(ids.min())), max(largest, int(ids.max()))
        with self.index.path.open("rb") as file:
            index_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"min_id": smallest, "max_id": largest, "bin_sha256": sha256.hexdigest(), "idx_sha256": index_sha256}

    def _sidecar(self) -> dict[str, Any]:
        try:
            facts = read_json(file_of(self.prefix, ".json"))
        except (OSError, ValueError):
            return {}
        fits = [facts.get(name) for name in COUNTS] == [self.num_documents, self.num_tokens]
        fits &= all(type(facts[name]) is kind for name, kind in KINDS.items() if name in facts) and facts.get("bytes", 0) >= 0
        return {name: value for name, value in facts.items() if name not in OF_VIEWS} if fits else {}


class StoreWriter:
    """Writes a store document by document, in bounded memory: `with StoreWriter(prefix, vocab_size, facts) as writer: writer.add(…)`.

    On leaving, .bin, .json and last .idx appear, each whole, by a rename: where there is an .idx, the store is complete. An exception
    leaves nothing behind. PREFIX.json holds `facts`, the counts of documents, tokens and bytes, the largest id, and both SHA-256.
    """

    def __init__(self, prefix: Path, vocab_size: int, facts: dict):
        self.prefix, self.vocab_size, self.facts = Path(prefix), vocab_size, facts
        self.dtype = np.dtype("<u2" if vocab_size < SHORT_VOCABULARY else "<i4")
        self.documents = self.tokens = self.num_bytes = 0
        self.max_id = -1
        self._begun = 0
        self._sha256 = hashlib.sha256()
        self._files = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as files:
            # they appear in the opposite order when the files are left
            self._index, self._sidecar, stream = (
                files.enter_context(published(file_of(self.prefix, end))) for end in (".idx", ".json", ".bin")
            )
            self._stream = files.enter_context(open(stream, "wb", WRITTEN_AT_ONCE))
            self._lengths = files.enter_context(tempfile.TemporaryFile(dir=self.prefix.parent))
            self._files = files.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._files.__exit__(kind, error, trace)
            return
        with self._files:  # an error here leaves nothing behind either
            if self._begun:
                self.add_tokens(np.zeros(0, self.dtype), np.array([0]), 0)
            self._stream.close()
            index_sha256 = hashlib.sha256()
            with open(self._index, "wb") as file:
                for piece in self._index_pieces():
                    file.write(piece)
                    index_sha256.update(piece)
            counts = {"documents": self.documents, "tokens": self.tokens, "bytes": self.num_bytes, "max_id": self.max_id}
            digests = {"bin_sha256": self._sha256.hexdigest(), "idx_sha256": index_sha256.hexdigest()}
            # written last: a sidecar that is older than the other files is not believed
            self._sidecar.write_text(json.dumps(self.facts | counts | digests, indent=1) + "\n", encoding="utf-8")

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        """Appends one document: its ids, end-of-text included, and the UTF-8 bytes of its text."""
        self.add_documents(ids, np.array([len(ids)]), num_bytes)

    def add_documents(self, ids: np.ndarray, lengths: np.ndarray, num_bytes: int) -> None:
        """Appends documents that lie one after the other in `ids`: their lengths in tokens, and the UTF-8 bytes of all their texts."""
        if lengths.sum() != len(ids):
            raise ValueError(f"{len(ids)} ids are not {lengths.sum()}, the sum of the documents' lengths")
        self.add_tokens(ids, np.cumsum(lengths), num_bytes)

    def add_tokens(self, ids: np.ndarray, ends: np.ndarray, num_bytes: int) -> None:
        """Appends tokens of documents that may have begun in an earlier call and may go on in the next.

        `ends`: how many of these tokens there are up to the end of each document that ends in them. The last document ends with the store.
        """
        lengths = np.diff(ends, prepend=-self._begun) if len(ends) else np.zeros(0, np.int64)
        begun = len(ids) - int(ends[-1]) if len(ends) else self._begun + len(ids)
        if max(lengths.max(initial=0), begun) > LONGEST:
            raise Mistake(f"a document has {max(lengths.max(initial=0), begun)} tokens, the format allows {LONGEST} → split the document")
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
            position = int(np.argmax((ids < 0) | (ids >= self.vocab_size)))
            document = self.documents + int(np.searchsorted(ends, position, side="right"))
            raise ValueError(f"token id {ids[position]} of document {document} is not in [0, {self.vocab_size})")
        raw = ids.astype(self.dtype).tobytes()
        self._stream.write(raw)
        self._sha256.update(raw)
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.documents, self._begun = self.documents + len(lengths), begun
        self.tokens += len(ids)
        self.num_bytes += num_bytes
        self.max_id = max(self.max_id, int(ids.max())) if len(ids) else self.max_id

    def _index_pieces(self) -> Iterator[bytes]:
        """The .idx file in pieces, with one sequence per document, as Megatron-LM's own preparation writes plain text."""
        yield HEADER.pack(MAGIC, 1, CODES[self.dtype.str], self.documents, self.documents + 1)
        self._lengths.seek(0)
        while piece := self._lengths.read(4 * CHUNK):
            yield piece
        self._lengths.seek(0)
        pointer = 0
        while piece := self._lengths.read(4 * CHUNK):
            sizes = np.frombuffer(piece, "<i4").astype(np.int64) * self.dtype.itemsize
            ends = pointer + np.cumsum(sizes)
            yield (ends - sizes).astype("<i8").tobytes()
            pointer = int(ends[-1])
        for first in range(0, self.documents + 1, CHUNK):
            yield np.arange(first, min(first + CHUNK, self.documents + 1), dtype="<i8").tobytes()


def write(prefix: Path, documents: Iterable[tuple[np.ndarray, int]], vocab_size: int, facts: dict) -> None:
    """Writes a store from (ids with their end-of-text, UTF-8 bytes of the text) of each document."""
    with StoreWriter(prefix, vocab_size, facts) as writer:
        for ids, num_bytes in documents:
            writer.add(np.asarray(ids), num_bytes)


def check_ids(store: TokenStore, vocab_size: int, whose: str = "model.vocab_size", way_out: str = "") -> None:
    """Raise a Mistake naming document and offset if a token is not in [0, vocab_size). Reads the whole store, at memory speed.

    `whose`: the setting that gives vocab_size. `way_out`: what would work; '' for a larger vocab_size.
    """
    for start in range(0, store.num_tokens, CHUNK):
        chunk = store.tokens[start : start + CHUNK]
        if chunk.max() < vocab_size and chunk.min() >= 0:
            continue
        position = start + int(np.argmax((chunk >= vocab_size) | (chunk < 0)))
        document = store.document_at(position)
        offset, token = position - int(store.document_offsets(document, document)[0]), int(store.tokens[position])
        way_out = (way_out or f"set {whose} to {token + 1} or more") if token >= 0 else "prepare it again"
        raise Mistake(
            f"{store.prefix}: token id {token} of document {document} at offset {offset} is not below {whose} = {vocab_size} → {way_out}"
        )
