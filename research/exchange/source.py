"""The interface of a model that is imported (Source), read one tensor at a time, and what its readers share."""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from models.conversion.families import Family
from models.conversion.mapping import Plan, check_copy
from models.encoder_config import AnyModel
from parallel.errors import Mistake
from parallel.files import write_json
from research.data.tokenizer_file import read_tokenizer_table

LARGEST_TABLE = 64 * 2**20
"""The most bytes of a table that is written anew."""


class Source(Protocol):
    """Another program's model: HFFolder or GGUFFile."""

    path: Path
    config: dict[str, Any]
    """The settings, named as in transformers' config.json."""
    family: Family
    shapes: dict[str, tuple[int, ...]]
    """The shape of every tensor, by its name."""

    def check(self, names: Iterable[str]) -> None:
        """Raises a Mistake if one of these tensors is stored in a format that cannot be read."""

    def read(self, name: str) -> Tensor:
        """Reads a tensor as fp32 on the CPU. Raises a Mistake if a value is not finite."""

    def files(self) -> list[Path]:
        """The files that the model is read from."""


def weights(source: Source, plan: Plan, model: AnyModel) -> Iterator[Tensor]:
    """Yields every parameter of `model`, unsliced and in fp32, in the order of the plan. One is in memory at a time."""
    for link in plan.parameters:
        tensor = link.ours([source.read(key) for key in link.keys], model)
        if link.name == "embedding.weight" and plan.copy:
            check_copy(source.read(plan.copy), tensor)
        yield tensor


def check_finite(tensor: Tensor, name: str) -> Tensor:
    """Returns the tensor. Raises a Mistake if a value is not finite."""
    if not bool(torch.isfinite(tensor).all()):
        raise Mistake(f"{name:.200} holds values that are not finite → such a model has diverged: take another one")
    return tensor


@contextlib.contextmanager
def private_view(files: Iterable[Path], tables: Mapping[str, Mapping[str, Any]]) -> Iterator[Path]:
    """Yields a temporary folder with these files alone, so that a reader sees no other file that lies beside them.

    They are links, except for small tables (JSON): these are written anew, without a byte-order mark and without names of programs.
    `tables` replaces the contents of files by name.
    """
    with tempfile.TemporaryDirectory() as folder:
        for path in files:
            if path.suffix == ".json" and path.stat().st_size <= LARGEST_TABLE:
                table = tables.get(path.name) or read_tokenizer_table(path, LARGEST_TABLE)
                write_json(Path(folder) / path.name, {key: value for key, value in table.items() if key != "auto_map"})
            else:
                (Path(folder) / path.name).symlink_to(path.resolve())
        yield Path(folder)
