"""Token store: a split's token ids as one memory-mapped stream, in Megatron-LM's .bin/.idx format (MMIDIDX, version 1).

PREFIX.bin   the ids, nothing else
PREFIX.idx   magic, uint64 version, uint8 type code, uint64 sequences, uint64 document indices (documents + 1);
             int32 lengths, int64 byte offsets, int64 document indices (all little-endian)
PREFIX.json  not part of Megatron-LM's format: where the ids came from, and the UTF-8 bytes of the text (for bits per byte)
"""

import contextlib
import hashlib
import json
import shutil
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from parallel.errors import Mistake
from parallel.files import published, read_json

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Megatron-LM's codes for integers (6 and 7 are floats). DeepSpeed's reader numbers them differently from 6 on."""
SHORT_VOCABULARY = 65500
"""Below this many tokens an id is stored as uint16, else as int32: Megatron-LM's rule."""
LONGEST = 2**31 - 1
CHUNK = 1 << 22
AGAIN = "→ prepare it again"


class TokenStore:
    """A split's tokens, read-only, as they lie on disk: documents one after the other, each followed by end-of-text."""

    def __init__(self, prefix: Path):
        self.prefix = Path(prefix)
        dtype, lengths, self.document_offsets = _read_index(_file(prefix, ".idx"))
        self.num_documents = len(self.document_offsets) - 1
        """Number of documents. Document k is tokens[document_offsets[k] : document_offsets[k + 1]]."""
        self.tokens = _map_tokens(_file(prefix, ".bin"), dtype, int(lengths.sum()))
        self.num_tokens = len(self.tokens)
        """Tokens of the stream, each document's end-of-text included."""

    def __repr__(self) -> str:
        return f"TokenStore({self.prefix.name}: {self.num_documents:,} documents, {self.num_tokens:,} tokens)"

    @property
    def facts(self) -> dict:
        """The content of PREFIX.json: source and tokenizer (with hashes), documents, tokens, bytes."""
        path = _file(self.prefix, ".json")
        try:
            return read_json(path)
        except (OSError, ValueError) as error:
            raise Mistake(f"{path} is missing or broken: bits per byte needs its count of bytes {AGAIN}") from error

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text; end-of-text is not counted."""
        return int(self.facts["bytes"])


class StoreWriter:
    """Writes a store document by document, in bounded memory: `with StoreWriter(prefix, vocab_size, facts) as writer: writer.add(…)`.

    On leaving, .bin, .json and last .idx appear, each whole, by a rename: where there is an .idx, the store is complete. An exception
    leaves nothing behind. PREFIX.json holds `facts`, the counts of documents, tokens and bytes, the largest id, and the .bin's SHA-256.
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
                files.enter_context(published(_file(self.prefix, end))) for end in (".idx", ".json", ".bin")
            )
            self._stream = files.enter_context(open(stream, "wb"))
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
            with open(self._index, "wb") as file:
                self._write_index(file)
            counts = {"documents": self.documents, "tokens": self.tokens, "bytes": self.num_bytes, "max_id": self.max_id}
            sidecar = self.facts | counts | {"bin_sha256": self._sha256.hexdigest()}
            self._sidecar.write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")

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
        self.max_id = max(self.max_id, int(ids.max()) if len(ids) else -1)

    def _write_index(self, file: BinaryIO) -> None:
        """The .idx file, with one sequence per document, as Megatron-LM's own preparation writes plain text."""
        code = next(code for code, name in CODES.items() if np.dtype(name) == self.dtype)
        file.write(HEADER.pack(MAGIC, 1, code, self.documents, self.documents + 1))
        self._lengths.seek(0)
        shutil.copyfileobj(self._lengths, file)
        self._lengths.seek(0)
        pointer = 0
        while chunk := self._lengths.read(4 * CHUNK):
            sizes = np.frombuffer(chunk, "<i4").astype(np.int64) * self.dtype.itemsize
            ends = pointer + np.cumsum(sizes)
            file.write((ends - sizes).astype("<i8").tobytes())
            pointer = int(ends[-1])
        for first in range(0, self.documents + 1, CHUNK):
            file.write(np.arange(first, min(first + CHUNK, self.documents + 1), dtype="<i8").tobytes())


def write(prefix: Path, documents: Iterable[tuple[np.ndarray, int]], vocab_size: int, facts: dict) -> None:
    """Writes a store from (ids with their end-of-text, UTF-8 bytes of the text) of each document."""
    with StoreWriter(prefix, vocab_size, facts) as writer:
        for ids, num_bytes in documents:
            writer.add(np.asarray(ids), num_bytes)


def check_ids(store: TokenStore, vocab_size: int) -> None:
    """Raise a Mistake naming document and offset if a token is not in [0, vocab_size). Reads the whole store, at memory speed."""
    for start in range(0, store.num_tokens, CHUNK):
        chunk = store.tokens[start : start + CHUNK]
        if chunk.max() < vocab_size and chunk.min() >= 0:
            continue
        position = start + int(np.argmax((chunk >= vocab_size) | (chunk < 0)))
        document = int(np.searchsorted(store.document_offsets, position, side="right")) - 1
        offset, token = position - int(store.document_offsets[document]), int(store.tokens[position])
        way_out = f"set model.vocab_size to {token + 1} or more" if token >= 0 else "prepare it again"
        raise Mistake(
            f"{store.prefix}: token id {token} of document {document} at offset {offset} is not below "
            f"model.vocab_size = {vocab_size} → {way_out}"
        )


def _file(prefix: Path, suffix: str) -> Path:
    return Path(f"{prefix}{suffix}")


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """Token type, sequence lengths (int64), and the documents' offsets in tokens, the end included."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror}) {AGAIN}") from error
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        raise Mistake(f"{path} is not a Megatron-LM index (it does not begin with MMIDIDX) {AGAIN}")
    _, version, code, sequences, indices = HEADER.unpack_from(raw)
    if version != 1 or code not in CODES:
        known = ", ".join(map(str, CODES))
        raise Mistake(f"{path} has version {version} and type code {code}; known are version 1 and codes {known} {AGAIN}")
    if len(raw) < HEADER.size + 12 * sequences + 8 * indices or indices == 0:
        raise Mistake(f"{path} is cut short: {len(raw)} bytes for {sequences} sequences and {indices} document indices {AGAIN}")
    lengths = np.frombuffer(raw, "<i4", sequences, HEADER.size).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", sequences, HEADER.size + 4 * sequences)
    documents = np.frombuffer(raw, "<i8", indices, HEADER.size + 12 * sequences)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    dtype = np.dtype(CODES[code])
    if lengths.min(initial=0) < 0 or not np.array_equal(pointers, offsets[:-1] * dtype.itemsize):
        raise Mistake(f"{path}: the sequences do not lie one after the other {AGAIN}")
    if documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise Mistake(f"{path}: the documents do not cover the {sequences} sequences in order {AGAIN}")
    return dtype, lengths, offsets[documents]


def _map_tokens(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """The memory-mapped ids, once the file's size is what the index says."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise Mistake(f"{path} is missing {AGAIN}") from error
    if size != count * dtype.itemsize or count == 0:
        raise Mistake(f"{path} has {size} bytes, its index promises {count} tokens = {count * dtype.itemsize} bytes {AGAIN}")
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
