"""Reads and checks the header of a GGUF file: metadata, and where each tensor lies. Nothing in it is trusted.

The gguf package's own reader takes every count and length from the file and allocates by it; here each is compared with a bound and
with what is left of the file first. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes the format. A ValueError says
what is wrong. Imports no torch.
"""

import mmap
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from parallel.regular_files import open_regular

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), "general.alignment"
STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value -> its struct format."""
MOST_FIELDS, MOST_TENSORS, MOST_ELEMENTS, MOST_DIMS = 2**12, 2**16, 2**21, 4
"""Models have about 50 fields, up to a few thousand tensors, and 256 thousand tokens with as many scores and types, and their merges."""
LONGEST_NAME, LONGEST_STRING, LARGEST_HEADER = 1000, 2**20, 2**26
"""In bytes. A chat template may have 2**20; all of the metadata of a model with 256 thousand tokens are 10 MB."""
LARGEST_ALIGNMENT, LARGEST_TENSOR = 2**16, 2**44


@dataclass(frozen=True)
class Array:
    """An array among the metadata: where its elements lie. They are decoded when they are asked for."""

    kind: int
    count: int
    offset: int


@dataclass(frozen=True)
class TensorInfo:
    """A tensor: its shape as torch counts it, ggml's number of its packing, and its first byte in the file."""

    shape: tuple[int, ...]
    packing: int
    offset: int


class Header:
    """The header of the file `path`. `metadata` has the fields that are no arrays, `arrays` the others."""

    def __init__(self, path: Path) -> None:
        with open_regular(path) as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size < 24:
                raise ValueError(f"it has {self.size} bytes")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._place = 0
        self._check_beginning()
        self._elements = 0
        tensors, fields = self._number("Q"), self._number("Q")
        _require(tensors <= MOST_TENSORS, f"it counts {tensors:,} tensors, more than {MOST_TENSORS:,}")
        _require(fields <= MOST_FIELDS, f"it counts {fields:,} fields, more than {MOST_FIELDS:,}")
        self.metadata: dict[str, Any] = {}
        self.arrays: dict[str, Array] = {}
        for _ in range(fields):
            self._read_field()
        self.tensors: dict[str, TensorInfo] = {}
        for _ in range(tensors):
            self._read_tensor()
        alignment = self.metadata.get(ALIGNMENT, 32)
        sane = type(alignment) is int and 0 < alignment <= LARGEST_ALIGNMENT and alignment & (alignment - 1) == 0
        _require(sane, f"{ALIGNMENT} = {alignment!r:.40} is no power of two up to {LARGEST_ALIGNMENT}")
        self.begin = -(-self._place // alignment) * alignment
        for name, tensor in self.tensors.items():
            _require(tensor.offset % alignment == 0, f"{name!r:.80} begins at {tensor.offset}, no multiple of {ALIGNMENT} = {alignment}")

    def elements(self, name: str) -> list[Any] | None:
        """The elements of an array; None if there is no such array."""
        array = self.arrays.get(name)
        if array is None:
            return None
        if array.kind != STRING:
            return list(struct.unpack_from(f"<{array.count}{NUMBERS[array.kind]}", self._map, array.offset))
        self._place = array.offset
        return [self._string(LONGEST_STRING) for _ in range(array.count)]

    def _check_beginning(self) -> None:
        _require(self._taken(4) == MAGIC, "it does not begin with GGUF")
        version = self._number("I")
        if version not in VERSIONS:
            is_big_endian = version & 0xFFFF == 0
            raise ValueError("its numbers are big-endian" if is_big_endian else f"it has version {version}, only 2 and 3 are read")

    def _read_field(self) -> None:
        name, kind = self._string(LONGEST_NAME), self._number("I")
        _require(name not in self.metadata and name not in self.arrays, f"{name!r:.80} is there twice")
        if kind == ARRAY:
            self.arrays[name] = self._array(name)
        elif kind == STRING:
            self.metadata[name] = self._string(LONGEST_STRING)
        else:
            _require(kind in NUMBERS, f"{name!r:.80} has the unknown type {kind}")
            self.metadata[name] = self._number(NUMBERS[kind])

    def _array(self, name: str) -> Array:
        """Skips an array. Its elements are counted before any is looked at."""
        kind, count = self._number("I"), self._number("Q")
        _require(kind == STRING or kind in NUMBERS, f"{name!r:.80} is an array of the type {kind}, which no model has")
        self._elements += count
        _require(
            self._elements <= MOST_ELEMENTS,
            f"its arrays have {self._elements:,} elements or more ({name!r:.80}), more than {MOST_ELEMENTS:,}",
        )
        least = 8 if kind == STRING else struct.calcsize(f"<{NUMBERS[kind]}")
        _require(count * least <= self.size - self._place, f"{name!r:.80} has {count:,} elements, which the file is too short for")
        array = Array(kind, count, self._place)
        if kind != STRING:
            self._taken(count * least)
        else:
            self._skip_strings(count)
        return array

    def _read_tensor(self) -> None:
        name, dims = self._string(LONGEST_NAME), self._number("I")
        _require(name not in self.tensors, f"the tensor {name!r:.80} is there twice")
        _require(0 < dims <= MOST_DIMS, f"{name!r:.80} has {dims} dims")
        shape = tuple(self._number("Q") for _ in range(dims))[::-1]
        sane = all(0 < size <= LARGEST_TENSOR for size in shape) and prod(shape) <= LARGEST_TENSOR
        _require(sane, f"{name!r:.80} has the shape {shape!r:.80}")
        self.tensors[name] = TensorInfo(shape, self._number("I"), self._number("Q"))

    def _number(self, kind: str) -> Any:
        (value,) = struct.unpack(f"<{kind}", self._taken(struct.calcsize(f"<{kind}")))
        return value

    def _string(self, longest: int) -> str:
        length = self._number("Q")
        _require(length <= longest, f"a text of it has {length:,} bytes, more than {longest:,}")
        return self._taken(length).decode("utf-8")

    def _skip_strings(self, count: int) -> None:
        """Moves behind `count` texts. There may be a million of them, so this is one loop without calls of its own."""
        length_at, place, end = struct.Struct("<Q").unpack_from, self._place, min(self.size, LARGEST_HEADER) - 8
        for _ in range(count):
            if place > end:
                break
            (length,) = length_at(self._map, place)
            if length > LONGEST_STRING:
                raise ValueError(f"a text of it has {length:,} bytes, more than {LONGEST_STRING:,}")
            place += 8 + length
        else:
            self._move(place - self._place)
            return
        raise ValueError(f"it ends within its header, or that has more than {LARGEST_HEADER:,} bytes")

    def _taken(self, count: int) -> bytes:
        place = self._place
        self._move(count)
        return self._map[place : self._place]

    def _move(self, count: int) -> None:
        self._place += count
        _require(self._place <= self.size, "it ends within its header")
        _require(self._place <= LARGEST_HEADER, f"its header has more than {LARGEST_HEADER:,} bytes")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
