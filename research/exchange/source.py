"""A model on its way from another program to us: what is read of it, a tensor at a time."""

import contextlib
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from models.config import GPT
from models.conversion.families import Family
from models.conversion.mapping import Plan, check_copy
from parallel.errors import Mistake
from parallel.files import sha256_of


class Source(Protocol):
    """Another program's model: what import reads, and from which the certificate is made."""

    path: Path
    config: dict[str, Any]
    """As transformers' config.json has it."""
    family: Family
    shapes: dict[str, tuple[int, ...]]
    """Of every tensor, by its name."""

    def check(self, names: Iterable[str]) -> None:
        """A Mistake where one of these tensors cannot be read as numbers."""

    def read(self, name: str) -> Tensor:
        """A tensor, fp32, on the CPU, all of it finite."""

    def files(self) -> list[Path]:
        """What it was read from."""


def weights(source: Source, plan: Plan, model: GPT) -> Iterator[Tensor]:
    """Every parameter of `model`, whole, fp32, in the order of the plan: one at a time in memory."""
    for link in plan.parameters:
        tensor = link.ours([source.read(key) for key in link.keys], model)
        if link.name == "embedding.weight" and plan.copy:
            check_copy(source.read(plan.copy), tensor)
        yield tensor


def digests(source: Source) -> dict[str, str]:
    """SHA-256 of each file of a model."""
    return {path.name: sha256_of(path) for path in source.files()}


def regular(path: Path) -> Path:
    """The path, if a file lies there. A link to one is a file (so the hub's cache is made); a pipe would be waited on for ever."""
    with contextlib.suppress(OSError):
        if stat.S_ISREG(path.stat().st_mode):
            return path
    raise Mistake(f"{path} is not there, or is not a file → fetch the model again")


def finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor, if all of it is."""
    if not bool(torch.isfinite(tensor).all()):
        raise Mistake(f"{name:.200} holds values that are not finite → such a model has diverged: take another one")
    return tensor


@contextlib.contextmanager
def view(files: Iterable[Path]) -> Iterator[Path]:
    """A folder for a while with links to these files and to nothing else that lies beside them."""
    with tempfile.TemporaryDirectory() as folder:
        for path in files:
            (Path(folder) / path.name).symlink_to(path.resolve())
        yield Path(folder)
