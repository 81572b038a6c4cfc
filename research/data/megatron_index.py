"""The .bin/.idx format of Megatron-LM, Megatron-DeepSpeed and GPT-NeoX (MMIDIDX, version 1): its index, read by memory map.

PREFIX.bin   the ids, nothing else
PREFIX.idx   magic, uint64 version, uint8 type code, uint64 sequences, uint64 document indices (documents + 1);
             int32 lengths, int64 byte offsets, int64 document indices; of multimodal stores, an int8 mode of each sequence, which is
             not read (all little-endian)

Document k is sequences document_indices[k] to document_indices[k + 1] (excluded). Sequences lie one after the other in the .bin.
"""

import struct
from pathlib import Path

import numpy as np

from parallel.errors import Mistake, listed

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPES: dict[int, dict[int, str]] = {
    1: {1: "u1"}, 2: {1: "i1"}, 3: {2: "<i2"}, 4: {4: "<i4"}, 5: {8: "<i8"}, 6: {2: "<u2"}, 7: {}, 8: {2: "<u2", 8: "<u8"},
}  # fmt: skip
"""Type code -> bytes per token -> type. Codes 1 to 5 mean the same everywhere. Megatron-LM, Megatron-DeepSpeed and GPT-NeoX have floats at
6 and 7 and uint16 at 8; DeepSpeed (runtime/data_pipeline/data_sampling) has uint16, uint32 and uint64. The size of the .bin tells which."""
FLOATS = {
    6: {4: "float32", 8: "float64"},
    7: {4: "float32 in Megatron-LM and uint32 in DeepSpeed, which nothing in the files tells apart", 8: "float64"},
}
AT_OPENING = 1 << 16
"""Sequences and documents that are checked whenever an index is opened. `check_order` checks all of them."""
CHUNK = 1 << 22
AGAIN = "→ copy the .bin and the .idx again, or prepare them again"


def file_of(prefix: Path, suffix: str) -> Path:
    """PREFIX.bin, .idx or .json. A prefix may itself hold dots."""
    return Path(f"{prefix}{suffix}")


class MegatronIndex:
    """The index of PREFIX.bin. Opening it reads a few pages, however long it is. A Mistake names the file and what is wrong."""

    def __init__(self, prefix: Path):
        self.path, self.stream = file_of(prefix, ".idx"), file_of(prefix, ".bin")
        raw, code, self.num_sequences, indices = _mapped(self.path)
        after_lengths = HEADER.size + 4 * self.num_sequences
        self.lengths = np.frombuffer(raw, "<i4", self.num_sequences, HEADER.size)
        self.pointers = np.frombuffer(raw, "<i8", self.num_sequences, after_lengths)
        self.document_indices = np.frombuffer(raw, "<i8", indices, after_lengths + 8 * self.num_sequences)
        self.num_documents = indices - 1
        self.dtype = self._check_size(code)
        self._check_documents(0, min(self.num_documents, AT_OPENING))
        if self.document_indices[0] != 0 or self.document_indices[-1] != self.num_sequences:
            raise self._wrong_documents()
        self._check_sequences(0, min(self.num_sequences, AT_OPENING))
        self.num_tokens = self.stream.stat().st_size // self.dtype.itemsize

    def document_offsets(self, first: int, last: int) -> np.ndarray:
        """int64: where documents `first` to `last` begin in the .bin, in tokens. The last one of all, num_documents, is the end."""
        sequences = self.document_indices[first : last + 1]
        offsets = self.pointers[np.minimum(sequences, self.num_sequences - 1)] // self.dtype.itemsize
        return np.where(sequences < self.num_sequences, offsets, self.num_tokens)

    def check_order(self) -> None:
        """Checks every sequence and every document. Reads the whole index."""
        for first in range(0, self.num_sequences, CHUNK):
            self._check_sequences(first, min(first + CHUNK, self.num_sequences))
        for first in range(0, self.num_documents, CHUNK):
            self._check_documents(first, min(first + CHUNK, self.num_documents))

    def _check_size(self, code: int) -> np.dtype:
        """The type of the tokens, once the .bin ends where the last sequence that is not empty ends."""
        try:
            size = self.stream.stat().st_size
        except OSError as error:
            raise Mistake(f"{self.stream} is missing, and {self.path} is there {AGAIN}") from error
        first, last = 0, self.num_sequences - 1
        while last >= 0 and self.lengths[last] == 0:
            last -= 1
        if last < 0:
            raise Mistake(f"{self.path} has {self.num_sequences} sequences without a token, {self.stream} has {size} bytes → use more text")
        while self.lengths[first] == 0:
            first += 1

        # where the second sequence begins tells how many bytes a token has; of a single one, only the size of the .bin can
        types, floats = TYPES[code], FLOATS.get(code, {})
        begin, length = int(self.pointers[last]), int(self.lengths[last])
        possible = [each for each in sorted({**types, **floats}) if first == last or self.pointers[first + 1] == self.lengths[first] * each]
        if not possible:
            raise self._wrong_sequences()
        for bytes_per_token in possible:
            if size != begin + length * bytes_per_token:
                continue
            if bytes_per_token in types:
                return np.dtype(types[bytes_per_token])
            raise Mistake(
                f"{self.path} has type code {code}, and {self.stream} {bytes_per_token} bytes per token: that is {floats[bytes_per_token]} "
                "→ write the store with whole numbers, uint16 (type code 8) or int32 (4)"
            )
        ends = [begin + length * each for each in possible]
        promised = listed(f"{end // each} tokens = {end} bytes" for each, end in zip(possible, ends, strict=True))
        raise Mistake(f"{self.stream} has {size} bytes, its index promises {promised} {AGAIN}")

    def _check_sequences(self, first: int, last: int) -> None:
        lengths = self.lengths[first:last].astype(np.int64)
        begins = np.append(self.pointers[first:last], self._pointer(last))
        if (lengths < 0).any() or begins[0] < 0 or (first == 0 and begins[0]) or (np.diff(begins) != lengths * self.dtype.itemsize).any():
            raise self._wrong_sequences()

    def _pointer(self, sequence: int) -> int:
        """Where a sequence begins, in bytes; of the number of sequences, the end."""
        return int(self.pointers[sequence]) if sequence < self.num_sequences else self.stream.stat().st_size

    def _check_documents(self, first: int, last: int) -> None:
        sequences = self.document_indices[first : last + 1]
        if sequences[0] < 0 or sequences.max() > self.num_sequences or (np.diff(sequences) < 0).any():
            raise self._wrong_documents()

    def _wrong_sequences(self) -> Mistake:
        return Mistake(f"{self.path}: the sequences do not lie one after the other {AGAIN}")

    def _wrong_documents(self) -> Mistake:
        return Mistake(f"{self.path}: the documents do not cover the {self.num_sequences} sequences in order {AGAIN}")


def _mapped(path: Path) -> tuple[np.ndarray, int, int, int]:
    """The memory-mapped bytes of an index, its type code, and its numbers of sequences and of document indices."""
    try:
        with path.open("rb") as file:
            head = file.read(HEADER.size)
        size = path.stat().st_size
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror}) {AGAIN}") from error
    if head.startswith(OLD_MAGIC):
        raise Mistake(f"{path} is an index of the older kind (TNTIDX) → write the store again with --dataset-impl mmap")
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise Mistake(f"{path} is not a Megatron-LM index (it does not begin with MMIDIDX, or has only {size} bytes) {AGAIN}")
    _, version, code, sequences, indices = HEADER.unpack(head)
    if version != 1 or code not in TYPES:
        known = listed(map(str, TYPES))
        raise Mistake(f"{path} has version {version} and type code {code}; known are version 1 and codes {known} {AGAIN}")
    needed = HEADER.size + 12 * sequences + 8 * indices
    if size not in (needed, needed + sequences) or indices == 0:  # with the modes of a multimodal store, or without
        problem = "is cut short" if size < needed else "is too long"
        raise Mistake(
            f"{path} {problem}: it has {size} bytes, {sequences} sequences and {indices} document indices need {needed} "
            f"({needed + sequences} with the modes of a multimodal store) {AGAIN}"
        )
    return np.memmap(path, np.uint8, mode="r").view(np.ndarray), code, sequences, indices
