"""A file that a stranger might send, as a test case: what any file can be instead, and what any field of a table can hold.

Many cases are derived: every field of a table gets every value of WRONG. A case is the change of a good one (`Bases`), which is copied
first, and the command that reads it. The cases are in hostile_models.py, hostile_gguf.py and hostile_runs.py.
"""

import functools
import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECRET = "CANARY-of-a-file-that-nobody-named"
STEERING = "\x1b]0;owned\x07\x1b[2J\r\u202e\u200b\u2028\x9b31m\n"
WRONG: dict[str, Any] = {
    "text": "x", "long": STEERING * 10_000, "negative": -1, "zero": 0, "huge": 2**39, "beyond": 2**70, "float": 1.5e308,
    "NaN": float("nan"), "list": [], "deep": functools.reduce(lambda inner, _: [inner], range(500), []), "table": {}, "null": None,
}  # fmt: skip


@dataclass(frozen=True)
class Bases:
    """Good ones of each kind."""

    hf: Path
    gguf: Path
    run: Path
    """runs/NAME/ID"""


@dataclass(frozen=True)
class Case:
    """A hostile file: `make` makes it in a folder and returns the arguments of the verb that reads it."""

    name: str
    make: Callable[[Path], list[str]]
    shown: bool = False
    """Whether the verb lists others beside it, and so ends with 0."""


def pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path has at most 108 characters
        one.bind(path.name)
        os.chdir(here)


def _secret(path: Path) -> None:
    path.symlink_to(place_of(path) / "secret.json")


def place_of(path: Path) -> Path:
    return next(parent for parent in path.parents if (parent / "secret.json").exists())


def _sparse(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return make


FILES: dict[str, Callable[[Path], None]] = {
    "a pipe": pipe,
    "a socket": _socket,
    "a folder": lambda path: path.mkdir(),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a secret": _secret,
    "nothing": lambda path: path.write_bytes(b""),
    "2 GB of holes": _sparse(2**31),
    "1 TB of holes": _sparse(2**40),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "nested": lambda path: path.write_bytes(b'{"a":' * 100_000),
    "many values": lambda path: path.write_bytes(b'{"a": [' + b"[]," * 4_000_000 + b"0]}"),
    "a long number": lambda path: path.write_bytes(b'{"a": ' + b"9" * 4000 + b"}"),
    "no table": lambda path: path.write_bytes(b"[]"),
}
"""What a file of JSON can be instead."""
TENSORS = {name: make for name, make in FILES.items() if name not in ("no table", "nested", "many values", "a long number")}


def replaced(path: Path, make: Callable[[Path], None]) -> None:
    """Puts something else at `path`."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    make(path)


def changed(path: Path, act: Callable[[dict], None]) -> None:
    """Rewrites a JSON file, NaN included."""
    table = json.loads(path.read_text())
    act(table)
    path.write_text(json.dumps(table))


def assign(field: str, value: Any) -> Callable[[dict], None]:
    """Sets a dotted field."""

    def act(table: dict) -> None:
        *groups, last = field.split(".")
        for group in groups:
            table = table[group]
        table[last] = value

    return act


def import_command(place: Path, source: str) -> list[str]:
    return ["import", source, "--as", str(place / "tree" / "experiments" / "mine"), "--runs", str(place / "runs")]
