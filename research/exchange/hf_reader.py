"""Reads a Hugging Face folder tensor by tensor: config.json, and safetensors in one file or in several with an index.

The folder may come from a stranger: no code in it is executed, and no path in it may lead out of it.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.conversion.families import FAMILIES
from models.conversion.read_config import settings, without_nulls
from parallel.errors import Mistake
from parallel.regular_files import check_inside, open_regular, parsed_json
from research.data.tokenizer_file import read_tokenizer_table
from research.exchange.source import check_finite

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
MOST_SHARDS = 10_000
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LARGEST_CONFIG, LARGEST_INDEX, LARGEST_HEADER = 4 * 2**20, 64 * 2**20, 2**24
"""The most bytes of config.json, of an index, and of a safetensors header. Large models have a few kB, 10 MB, and 1 MB."""
MOST_TENSORS = 2**17
"""The most tensors of one file: a header has about 5 values for each."""
READABLE_DTYPES = {"F32", "F16", "BF16", "F64"}
"""Dtypes that are converted to float32: F64 is rounded, the others are exact."""


class HFFolder:
    """A Source that reads a Hugging Face folder. Opening it reads every file's header but no tensor. Use it in a `with` statement."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = without_nulls(read_tokenizer_table(check_inside(path / CONFIG, path), LARGEST_CONFIG))
        settings(self.config)  # raises a Mistake for a family or a setting that is not supported
        self.family = FAMILIES[self.config["model_type"]]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._file_of: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        index = _index(path)
        for name in sorted(set(index.values())) if index else [SINGLE]:
            self._open_file(name, index)
        for key, name in (index or {}).items():
            if key not in self.shapes:
                raise Mistake(f"{path / INDEX} names {key:.200}, which {name} does not hold → fetch the model again")

    def __enter__(self) -> "HFFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.clear()

    def check(self, names: Iterable[str]) -> None:
        for name in names:
            if self._dtypes[name] not in READABLE_DTYPES:
                problem = f"{self.path / self._file_of[name]}: {name:.200} is {self._dtypes[name]}"
                raise Mistake(f"{problem}, which is not read → take the model in float32, float16 or bfloat16")

    def read(self, name: str) -> Tensor:
        try:
            return check_finite(self._open[self._file_of[name]].get_tensor(name).to(torch.float32), name)
        except (OSError, SafetensorError) as error:
            raise _unreadable(self.path / self._file_of[name], error) from error

    def files(self) -> list[Path]:
        index = [INDEX] if SINGLE not in self._open else []
        return [self.path / name for name in (CONFIG, *index, *self._open)]

    def _open_file(self, name: str, index: Mapping[str, str] | None) -> None:
        path = check_inside(self.path / name, self.path)
        try:
            _check_header(path)
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118  a safetensors file is not a mapping
                if index is not None and index.get(key) != name:
                    entry = f"says {index[key]}" if key in index else "does not name it"
                    raise Mistake(f"{path} holds {key:.200}, but {INDEX} {entry} → fetch the model again")
                tensor = file.get_slice(key)
                self.shapes[key], self._dtypes[key], self._file_of[key] = tuple(tensor.get_shape()), str(tensor.get_dtype()), name
        except (OSError, ValueError, SafetensorError) as error:
            if isinstance(error, Mistake):
                raise
            raise _unreadable(path, error) from error
        self._open[name] = file


def _index(path: Path) -> dict[str, str] | None:
    """The index, tensor name -> file name; None if all tensors are in one file."""
    if (path / SINGLE).exists():
        return None
    if not (path / INDEX).exists():
        _raise_no_weights(path)
    index = read_tokenizer_table(check_inside(path / INDEX, path), LARGEST_INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise Mistake(f"{path / INDEX} has no weight_map that is a table of tensors → fetch the model again")
    for key, name in index.items():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise Mistake(f"{path / INDEX} puts {key:.200} into {name!r:.80}, no plain name of a .safetensors file → do not use it")
    if len(set(index.values())) > MOST_SHARDS:
        raise Mistake(f"{path / INDEX} names {len(set(index.values()))} files, more than {MOST_SHARDS} → do not use it")
    return index


def _check_header(path: Path) -> None:
    """Raises a ValueError for a header that would take much memory: the library reads one of up to 100 MB whole."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise ValueError(f"its header has {length:,} bytes, more than {LARGEST_HEADER:,}")
        parsed_json(file.read(length), 8 * MOST_TENSORS)


def _raise_no_weights(path: Path) -> NoReturn:
    """Raises a Mistake that says what the folder holds instead of safetensors."""
    for pattern in PICKLES:
        for pickle in sorted(path.glob(pattern)):
            raise Mistake(
                f"{pickle} is a pickle, which is a program: it is not opened → where you trust it, "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER) writes safetensors, which are imported"
            )
    for gguf in sorted(path.glob("*.gguf")):
        raise Mistake(f"{path} holds neither {SINGLE} nor {INDEX} → name the file: import {gguf}")
    raise Mistake(f"{path} holds neither {SINGLE} nor {INDEX} → name a Hugging Face folder or a .gguf file")


def _unreadable(path: Path, error: Exception) -> Mistake:
    return Mistake(f"{path} cannot be read ({' '.join(str(error).split())[:120]}) → fetch the model again")
