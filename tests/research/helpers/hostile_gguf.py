"""Hostile GGUF files, each wrong in one way (hostile_cases.py)."""

import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.research.helpers.hostile_cases import STEERING, TENSORS, Bases, Case, import_command, replaced


def gguf_cases(bases: Bases) -> Iterator[Case]:
    """Wrong headers; and every file that is none."""

    def case(name: str, act: Callable[[Path], Any]) -> Case:
        def make(place: Path) -> list[str]:
            shutil.copyfile(bases.gguf, place / "model.gguf")
            act(place / "model.gguf")
            return import_command(place, "model.gguf")

        return Case(f"gguf: {name}", make)

    for name, kind in TENSORS.items():
        yield case(f"the file is {name}", lambda path, kind=kind: replaced(path, kind))
    for name, content in gguf_headers().items():
        yield case(name, lambda path, content=content: path.write_bytes(content))
    size = bases.gguf.stat().st_size
    for part in range(1, 10):
        yield case(f"{part} tenths of it", lambda path, part=part: os.truncate(path, size * part // 10))
    for place, what in ((4, "version"), (8, "tensors"), (16, "fields"), (24, "length of the first name")):
        for name, number in (("2^31", 2**31), ("2^62", 2**62), ("2^64 - 1", 2**64 - 1)):
            yield case(f"{what} is {name}", lambda path, place=place, number=number: _overwritten(path, place, struct.pack("<Q", number)))


def _overwritten(path: Path, place: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


def gguf_headers() -> dict[str, bytes]:
    """Whole small files, each wrong in one place."""

    def text(value: str | bytes) -> bytes:
        raw = value.encode() if isinstance(value, str) else value
        return struct.pack("<Q", len(raw)) + raw

    def field(name: str, kind: int, value: bytes) -> bytes:
        return text(name) + struct.pack("<I", kind) + value

    def array(kind: int, count: int, elements: bytes = b"") -> bytes:
        return struct.pack("<IQ", kind, count) + elements

    def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0, dims: int | None = None) -> bytes:
        sizes = b"".join(struct.pack("<Q", size) for size in shape)
        return text(name) + struct.pack("<I", len(shape) if dims is None else dims) + sizes + struct.pack("<IQ", kind, offset)

    def file(fields: list[bytes], tensors: list[bytes] | None = None, version: int = 3, more: int = 4096) -> bytes:
        tensors = tensors or []
        head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields))
        return head + b"".join(fields) + b"".join(tensors) + bytes(more)

    tokens = "tokenizer.ggml.tokens"
    llama = field("general.architecture", 8, text("llama"))
    layers = field("llama.block_count", 10, struct.pack("<Q", 2**40))
    return {
        "an array of 2^40 numbers": file([field(tokens, 9, array(4, 2**40))]),
        "an array of 2^33 texts": file([field(tokens, 9, array(8, 2**33))]),
        "an array of 4 million texts": file([field(tokens, 9, array(8, 4_000_000, bytes(32_000_000)))]),
        "an array of 2 million texts": file([field(tokens, 9, array(8, 2_000_000, bytes(16_000_000)))]),
        "five million numbers": file([field(tokens, 9, array(0, 5_000_000, bytes(5_000_000)))]),
        "an array of arrays": file([field(tokens, 9, array(9, 1, array(9, 1, array(9, 2**62))))]),
        "a text of 2^62 bytes": file([field("a", 8, struct.pack("<Q", 2**62))]),
        "a text of 2 MB": file([field("a", 8, text("x" * 2**21))]),
        "a name of 2 kB": file([field("a" * 2000, 4, struct.pack("<I", 1))]),
        "an unknown type": file([field("a", 13, b"")]),
        "a type of 2^32 - 1": file([field("a", 2**32 - 1, b"")]),
        "a field twice": file([field("a", 4, bytes(4)), field("a", 4, bytes(4))]),
        "alignment 0": file([llama, field("general.alignment", 4, bytes(4))]),
        "alignment 3": file([llama, field("general.alignment", 4, struct.pack("<I", 3))]),
        "alignment 2^31": file([llama, field("general.alignment", 4, struct.pack("<I", 2**31))]),
        "alignment by name": file([llama, field("general.alignment", 8, text("32"))]),
        "version 1": file([llama], version=1),
        "version 99": file([llama], version=99),
        "big-endian": file([llama], version=3 << 24),
        "no dims": file([llama], [tensor("a", [])]),
        "2^32 - 1 dims": file([llama], [tensor("a", [1], dims=2**32 - 1)]),
        "no elements": file([llama], [tensor("a", [0])]),
        "2^62 elements": file([llama], [tensor("a", [2**62])]),
        "an overflow": file([llama], [tensor("a", [2**33, 2**33, 2**33, 2**33])]),
        "beyond the end": file([llama], [tensor("a", [2**20])]),
        "an offset of 2^60": file([llama], [tensor("a", [8], offset=2**60)]),
        "an odd offset": file([llama], [tensor("a", [8], offset=7)]),
        "overlapping": file([llama], [tensor("a", [32]), tensor("b", [32], offset=32)]),
        "a tensor twice": file([llama], [tensor("a", [8]), tensor("a", [8], offset=32)]),
        "an unknown packing": file([llama], [tensor("a", [8], kind=999)]),
        "rows that are no blocks": file([llama], [tensor("a", [8], kind=8)]),
        "factors without end": file([llama, layers], [tensor("rope_freqs.weight", [2**20])], more=2**23),
        "2^40 layers": file([llama, layers]),
        "an architecture of escapes": file([field("general.architecture", 8, text(STEERING * 1000))]),
        "a name that is no UTF-8": file([field("general.architecture", 8, text(b"\xff\xfe"))]),
    }
