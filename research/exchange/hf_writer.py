"""Writes the weights of a Hugging Face folder tensor by tensor: safetensors in one file, or in several with an index."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.checkpoint.tensor_file import Entry, TensorFile
from parallel.errors import Mistake
from parallel.files import write_json
from research.exchange.hf_reader import INDEX, SINGLE


class TensorShape(NamedTuple):
    """Name and shape of a tensor that will be written."""

    key: str
    shape: tuple[int, ...]


def assign_files(tensors: Sequence[TensorShape], dtype: str, largest: int) -> list[tuple[str, list[Entry]]]:
    """Assigns the tensors, in order, to files of at most `largest` bytes. A tensor that is larger has a file of its own."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for tensor in tensors:
        entry = Entry(tensor.key, tensor.shape, dtype)
        if shards[-1] and size + entry.size > largest:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.size
    if len(shards) == 1:
        return [(SINGLE, shards[0])]
    return [(f"model-{i:05d}-of-{len(shards):05d}.safetensors", shard) for i, shard in enumerate(shards, 1)]


def write_weights(folder: Path, files: Sequence[tuple[str, list[Entry]]], tensors: Iterable[Tensor]) -> None:
    """Writes the tensors, one at a time, into their files in `folder`, and an index if there are several files."""
    stream = iter(tensors)
    for name, entries in files:
        file = TensorFile(folder / name, entries)
        try:
            for entry in entries:
                file.add(_round(next(stream), entry))
            file.close()
        except BaseException:
            file.abandon()
            raise
    if len(files) > 1:
        file_of = {entry.key: name for name, entries in files for entry in entries}
        total = sum(entry.size for _, entries in files for entry in entries)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))})


def _round(tensor: Tensor, entry: Entry) -> Tensor:
    """Converts to the dtype of the file. Raises a Mistake if a number does not fit into it."""
    rounded = tensor.to(getattr(torch, entry.dtype))
    if not bool(torch.isfinite(rounded).all()):
        problem = "holds values that are not finite" if not bool(torch.isfinite(tensor).all()) else f"does not fit into {entry.dtype}"
        raise Mistake(f"{entry.key} {problem} → take another checkpoint, or --dtype bfloat16 or float32")
    return rounded
