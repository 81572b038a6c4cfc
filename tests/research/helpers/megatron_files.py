"""Megatron's .bin/.idx files, read and written from the format's description with struct and numpy alone. Nothing of research/ is used."""

import struct
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_LM = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
"""DType of megatron/core/datasets/indexed_dataset.py."""
MEGATRON_DEEPSPEED = {**MEGATRON_LM, 7: "<f8"}
"""`dtypes` of megatron/data/indexed_dataset.py, in Megatron-DeepSpeed and in GPT-NeoX: float and double are both of eight bytes."""
DEEPSPEED = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<u2", 7: "<u4", 8: "<u8"}
"""`dtypes` of deepspeed/runtime/data_pipeline/data_sampling/indexed_dataset.py."""


def write(prefix: Path, documents: list[list[list[int]]], code: int, dtype: str, modes: list[int] | None = None) -> None:
    """Documents of sequences of ids, as Megatron's IndexedDatasetBuilder writes them; `modes` only where it is multimodal."""
    sequences = [sequence for document in documents for sequence in document]
    stream = b"".join(np.array(sequence, dtype).tobytes() for sequence in sequences)
    Path(f"{prefix}.bin").write_bytes(stream)
    pointers, indices, position = [], [0], 0
    for sequence in sequences:
        pointers.append(position)
        position += len(sequence) * np.dtype(dtype).itemsize
    for document in documents:
        indices.append(indices[-1] + len(document))
    raw = MAGIC + struct.pack("<QB", 1, code) + struct.pack("<QQ", len(sequences), len(indices))
    raw += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    raw += struct.pack(f"<{len(pointers)}q", *pointers) + struct.pack(f"<{len(indices)}q", *indices)
    raw += b"" if modes is None else struct.pack(f"<{len(modes)}b", *modes)
    Path(f"{prefix}.idx").write_bytes(raw)


def read(prefix: Path) -> list[list[list[int]]]:
    """The documents of a store as lists of sequences, by Megatron-LM's type codes."""
    index, stream = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == MAGIC and struct.unpack_from("<Q", index, 9) == (1,)
    dtype = MEGATRON_LM[index[17]]
    sequences, indices = struct.unpack_from("<QQ", index, 18)
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    pointers = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    borders = struct.unpack_from(f"<{indices}q", index, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * indices and borders[0] == 0 and borders[-1] == sequences
    found = [np.frombuffer(stream, dtype, length, pointer).tolist() for length, pointer in zip(lengths, pointers, strict=True)]
    assert sum(lengths) * np.dtype(dtype).itemsize == len(stream)
    return [found[begin:end] for begin, end in zip(borders, borders[1:], strict=False)]
