"""Writes a safetensors file as a stream: hashed while written, synced when closed, one tensor in memory at a time.

safetensors' own writer needs all tensors of a file at once and copies them, and a hash would have to read the file again. The format
is a length, a JSON header and the tensors' bytes (https://huggingface.co/docs/safetensors). The files are read with safetensors.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.checkpoint.manifest import File

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 2**20
"""Bytes that are hashed and then written at a time, while they are still in the processor's cache."""
SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""torch's name of a dtype -> the format's. Checkpoints hold float32 only; the others are for exports."""
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file, before it is written."""

    key: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def size(self) -> int:
        """Number of bytes."""
        return prod(self.shape) * BYTES[self.dtype]


class TensorFile:
    """Writes the new file `path` with `entries` in this order, `at_once` bytes at a time."""

    def __init__(self, path: Path, entries: Sequence[Entry], at_once: int = AT_ONCE) -> None:
        self.path, self.waiting, self.at_once = path, list(entries), at_once
        self.hash, self.size = hashlib.sha256(), 0
        self.file = path.open("xb", buffering=0)  # an error if it exists
        self._write(header(entries))

    def add(self, tensor: "Tensor") -> None:
        """Writes the next entry's tensor, which is on the CPU. It need not be contiguous."""
        entry = self.waiting.pop(0)
        if tuple(tensor.shape) != entry.shape or str(tensor.dtype) != f"torch.{entry.dtype}":
            raise ValueError(f"{entry} was to follow in {self.path}, not {tensor.dtype} {tuple(tensor.shape)}")
        import torch

        # As it lies in memory: little-endian on every machine that torch runs on. Through uint8, because numpy has no bfloat16.
        self._write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)

    def close(self) -> File:
        """Waits until the file is on disk, and returns its size and hash."""
        if self.waiting:
            raise ValueError(f"{self.path} is to hold {self.waiting[0]} too")
        os.fsync(self.file.fileno())
        self.file.close()
        return File(self.size, self.hash.hexdigest())

    def abandon(self) -> None:
        """Closes a file that will not be finished."""
        self.file.close()

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), self.at_once):
            part = view[start : start + self.at_once]
            self.hash.update(part)
            while part:  # a disk that fills up accepts a part before it refuses the rest
                part = part[self.file.write(part) :]
        self.size += len(view)


def header(entries: Sequence[Entry]) -> bytes:
    """The beginning of a safetensors file: the length of the JSON as 8 bytes, little-endian, and the JSON, padded to a multiple of 8."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.size
        table[entry.key] = {"dtype": SAFETENSORS[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    if len(table) != len(entries) + 1:
        raise ValueError(f"two of the {len(entries)} tensors of a file have the same name")
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
