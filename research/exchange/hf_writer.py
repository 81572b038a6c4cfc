"""A Hugging Face folder's weights, written tensor by tensor: safetensors in one file, or in several with an index."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.checkpoint.tensor_file import Entry, TensorFile
from parallel.errors import Mistake
from parallel.files import write_synced
from research.exchange.hf_reader import INDEX, SINGLE


class Written(NamedTuple):
    """A tensor to be written."""

    key: str
    shape: tuple[int, ...]


def shards(tensors: Sequence[Written], dtype: str, largest: int) -> list[tuple[str, list[Entry]]]:
    """The files in which tensors are written in this order, each at most `largest` bytes or one tensor that is larger."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for tensor in tensors:
        entry = Entry(tensor.key, tensor.shape, dtype)
        if groups[-1] and size + entry.size > largest:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.size
    if len(groups) == 1:
        return [(SINGLE, groups[0])]
    return [(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def write_weights(folder: Path, files: Sequence[tuple[str, list[Entry]]], tensors: Iterable[Tensor]) -> None:
    """Writes the tensors, one at a time, into their files in `folder`; an index beside them where there are several."""
    stream = iter(tensors)
    for name, entries in files:
        file = TensorFile(folder / name, entries)
        try:
            for entry in entries:
                file.add(_rounded(next(stream), entry))
            file.close()
        except BaseException:
            file.abandon()
            raise
    if len(files) > 1:
        place = {entry.key: name for name, entries in files for entry in entries}
        total = sum(entry.size for _, entries in files for entry in entries)
        write_table(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))})


def _rounded(tensor: Tensor, entry: Entry) -> Tensor:
    """In the dtype of the file; a Mistake where a number does not fit."""
    found = tensor.to(getattr(torch, entry.dtype))
    if not bool(torch.isfinite(found).all()):
        what = "holds values that are not finite" if not bool(torch.isfinite(tensor).all()) else f"does not fit into {entry.dtype}"
        raise Mistake(f"{entry.key} {what} → take another checkpoint, or --dtype bfloat16 or float32")
    return found


def write_table(path: Path, table: Mapping[str, Any]) -> None:
    """A JSON file, on disk when this returns."""
    write_synced(path, (json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
