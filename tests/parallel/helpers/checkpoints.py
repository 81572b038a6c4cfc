"""Checkpoints as tests write and read them: without an engine, and by numpy and json alone."""

import hashlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from parallel.checkpoint.writer import BYTES_PER_FILE, CheckpointWriter, Part, Saved, write
from parallel.grid import Grid

TENSORS = {f"layer.{i}.weight": torch.full((4, 5), float(i)) for i in range(6)}


def by_another_reader(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """{kind: {logical name: the whole tensor}}; every element of every file is used once, and of every tensor given once."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {name: load_file(folder / name) for name in manifest["files"] if name.endswith(".safetensors")}
    found: dict[str, dict[str, np.ndarray]] = {}
    for kind, table in manifest["tensors"].items():
        for name, entry in table.items():
            whole, times = np.zeros(entry["shape"], entry["dtype"]), np.zeros(entry["shape"], int)
            for piece in entry["pieces"]:
                rows = (slice(None),) * piece["dim"] + (slice(piece["start"], piece["start"] + piece["length"]),)
                whole[rows] = files[piece["file"]].pop(piece["key"])
                times[rows] += 1
            assert (times == 1).all(), f"{kind} of {name}: an element is not written once"
            found.setdefault(kind, {})[name] = whole
    assert not any(files.values()), "a tensor is in no table"
    return found


def save(folder: Path, offset: float = 0.0, step: int = 1, bytes_per_file: int = BYTES_PER_FILE) -> Path:
    """Weights alone, from one process: no process group is needed."""
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    write(folder, shapes, (tensor + offset for tensor in TENSORS.values()), {"step": step}, bytes_per_file)
    return folder


def save_on(grid: Grid, folder: Path, offset: float = 0.0, step: int = 1) -> Saved:
    """The same from all ranks: each writes its rows of the first tensors, and the last is dealt to the last rank."""
    *cut, (last, whole) = TENSORS.items()
    rows = 4 // grid.world
    first = grid.rank * rows
    parts = [Part("weights", name, (4, 5), 0, first, rows) for name, _ in cut]
    mine = [tensor[first : first + rows] + offset for _, tensor in cut]
    if grid.rank == grid.world - 1:
        parts.append(Part("weights", last, (4, 5), 0, 0, 4))
        mine.append(whole + offset)
    checkpoint = CheckpointWriter(folder, parts, {"step": step}, grid)
    for tensor in mine:
        checkpoint.write(tensor)
    return checkpoint.finish()


def all_but_slow(cases: Iterable, fast: Collection) -> list:
    """Parameters of a test: every case, those that are not `fast` in `make test-slow` only."""
    return [
        case if case in fast else pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow) for case in cases
    ]


def change_manifest(folder: Path, change) -> None:
    """Rewrites the manifest as `change` left it, signed as a stranger could."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(signed(manifest)))


def signed(manifest: dict) -> dict:
    """With the SHA-256 of all else, as docs/checkpoints.md defines it."""
    entries = {name: value for name, value in manifest.items() if name != "sha256"}
    return entries | {"sha256": hashlib.sha256(json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()).hexdigest()}


def hidden(folder: Path) -> list[str]:
    """What lies there under a name that begins with a dot."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
