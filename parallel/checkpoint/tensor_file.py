"""One safetensors file written as a stream: hashed on the way, on disk when closed, one tensor in memory at a time.

safetensors' own writer wants all tensors of a file at once and copies them; its hash would be a second reading. The format is a
length, a JSON header and the bytes one behind the other (https://huggingface.co/docs/safetensors), and is read by safetensors.
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
"""Bytes that are hashed and then written while they are still in the processor's cache."""
SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""torch's name of a dtype -> the format's. Checkpoints hold the first alone; the others are for other programs."""
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Entry:
    """A tensor that a file is to hold."""

    key: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * BYTES[self.dtype]


class TensorFile:
    """The file `path`, to hold `entries` in this order. Must not be there yet."""

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self.path, self.waiting = path, list(entries)
        self.hash, self.size = hashlib.sha256(), 0
        self.file = path.open("xb", buffering=0)
        self._write(header(entries))

    def add(self, tensor: "Tensor") -> None:
        """Writes the next entry's tensor, which is on the CPU; in any memory order."""
        entry = self.waiting.pop(0)
        if tuple(tensor.shape) != entry.shape or str(tensor.dtype) != f"torch.{entry.dtype}":
            raise ValueError(f"{entry} was to follow in {self.path}, not {tensor.dtype} {tuple(tensor.shape)}")
        self._write(_bytes(tensor))

    def close(self) -> File:
        """Waits until the file is on disk; its size and hash."""
        if self.waiting:
            raise ValueError(f"{self.path} is to hold {self.waiting[0]} too")
        os.fsync(self.file.fileno())
        self.file.close()
        return File(self.size, self.hash.hexdigest())

    def abandon(self) -> None:
        """Lets go of a file that will not be finished."""
        self.file.close()

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), AT_ONCE):
            part = view[start : start + AT_ONCE]
            self.hash.update(part)
            while part:  # a disk that fills up takes a part of it before it refuses the rest
                part = part[self.file.write(part) :]
        self.size += len(view)


def _bytes(tensor: "Tensor") -> memoryview:
    """As they lie in memory, little-endian on every machine that torch runs on; numpy has no bfloat16."""
    import torch

    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def header(entries: Sequence[Entry]) -> bytes:
    """A safetensors file's begin: the length of the JSON as 8 bytes, little-endian, and the JSON, padded to a multiple of 8."""
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.size
        described[entry.key] = {"dtype": SAFETENSORS[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    if len(described) != len(entries) + 1:
        raise ValueError(f"two of the {len(entries)} tensors of a file have the same name")
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
