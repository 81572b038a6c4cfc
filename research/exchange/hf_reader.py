"""A Hugging Face folder, read tensor by tensor. It may come from a stranger: nothing of it is executed, no path in it leads out of it.

Weights are safetensors, in one file or in several with an index.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.conversion.families import FAMILIES
from models.conversion.read_config import settings
from parallel.errors import Mistake
from research.data.tokenizer_file import read_table
from research.exchange.source import finite, regular

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
MOST_SHARDS = 10_000
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
WIDENED = {"F32", "F16", "BF16", "F64"}
"""What is read as float32: exactly, but for F64, which is rounded."""


class HFFolder:
    """A Hugging Face folder, opened: a Source. Every file is looked at, no tensor read. Use it in a `with`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_table(path / CONFIG)
        self.family = FAMILIES[family_of(self.config)]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._place: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        index = _index(path)
        for name in sorted(set(index.values())) if index else [SINGLE]:
            self._look_into(name, index)
        for key, name in (index or {}).items():
            if key not in self.shapes:
                raise Mistake(f"{path / INDEX} names {key:.200}, which {name} does not hold → fetch the model again")

    def __enter__(self) -> "HFFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.clear()

    def check(self, names: Iterable[str]) -> None:
        """See Source."""
        for name in names:
            if self._dtypes[name] not in WIDENED:
                told = f"{self.path / self._place[name]}: {name:.200} is {self._dtypes[name]}"
                raise Mistake(f"{told}, which is not read → take the model in float32, float16 or bfloat16")

    def read(self, name: str) -> Tensor:
        """See Source."""
        try:
            return finite(self._open[self._place[name]].get_tensor(name).to(torch.float32), name)
        except (OSError, SafetensorError) as error:
            raise _unreadable(self.path / self._place[name], error) from error

    def files(self) -> list[Path]:
        """See Source."""
        index = [INDEX] if SINGLE not in self._open else []
        return [self.path / name for name in (CONFIG, *index, *self._open)]

    def _look_into(self, name: str, index: Mapping[str, str] | None) -> None:
        path = regular(self.path / name)
        try:
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118  a safetensors file is not a mapping
                if index is not None and index.get(key) != name:
                    there = f"says {index[key]}" if key in index else "does not name it"
                    raise Mistake(f"{path} holds {key:.200}, but {INDEX} {there} → fetch the model again")
                told = file.get_slice(key)
                self.shapes[key], self._dtypes[key], self._place[key] = tuple(told.get_shape()), str(told.get_dtype()), name
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error
        self._open[name] = file


def family_of(config: Mapping[str, Any]) -> str:
    """The family that a config.json names; a Mistake for one that we do not read. All of its settings are looked at."""
    settings(config)
    return config["model_type"]


def _index(path: Path) -> dict[str, str] | None:
    """Tensor -> file; None where all lie in one."""
    if (path / SINGLE).exists():
        return None
    if not (path / INDEX).exists():
        raise _no_weights(path)
    index = read_table(path / INDEX, 64 * 2**20).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise Mistake(f"{path / INDEX} has no weight_map that is a table of tensors → fetch the model again")
    for key, name in index.items():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise Mistake(f"{path / INDEX} puts {key:.200} into {name!r:.80}, no plain name of a .safetensors file → do not use it")
    if len(set(index.values())) > MOST_SHARDS:
        raise Mistake(f"{path / INDEX} names {len(set(index.values()))} files, more than {MOST_SHARDS} → do not use it")
    return index


def _no_weights(path: Path) -> Mistake:
    for pattern in PICKLES:
        for found in sorted(path.glob(pattern)):
            return Mistake(
                f"{found} is a pickle, which is a program: it is not opened → where you trust it, "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER) writes safetensors, which are imported"
            )
    for found in sorted(path.glob("*.gguf")):
        return Mistake(f"{path} holds neither {SINGLE} nor {INDEX} → name the file: import {found}")
    return Mistake(f"{path} holds neither {SINGLE} nor {INDEX} → name a Hugging Face folder or a .gguf file")


def _unreadable(path: Path, error: Exception) -> Mistake:
    return Mistake(f"{path} cannot be read ({' '.join(str(error).split())[:120]}) → fetch the model again")
