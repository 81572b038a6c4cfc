"""Layout-free checkpoints: written by any layout, read by any layout. safetensors + JSON, no pickle anywhere.

    step_000300/manifest.json                format, step, samples, every file's size and SHA-256, every logical tensor's place
    step_000300/weights-0000-of-0004.safetensors …   fp32 master weights by logical name

A checkpoint is written to a hidden sibling, files fsynced, the manifest last, then renamed in one go; `latest` (a file holding
the folder's name) is replaced after that. So a folder without a leading dot is complete, whatever was killed when.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from parallel.errors import Mistake
from parallel.grid import Grid
from parallel.layers import unique_parameters
from parallel.slices import slice_of

FORMAT = 1
BYTES_PER_FILE = 256 * 2**20
"""Files are cut at this size, which also bounds what a writer holds in memory."""
ENTRIES: dict[str, dict[str, type]] = {"files": {"size": int, "sha256": str}, "tensors": {"file": str}}
"""What a reader needs of each entry of the manifest's tables."""


def write(folder: Path, tensors: Iterable[tuple[str, Tensor]], facts: dict[str, Any], grid: Grid) -> None:
    """Writes the checkpoint `folder` from `tensors`: (logical name, whole fp32 tensor), as `Engine.full_weights` yields them.

    Collective over all ranks: every rank walks `tensors` in the same order; of each stage's, tensor rank 0 of data rank i
    writes every (data size)-th. `facts` (step, samples, …) go into the manifest. The folder appears complete or not
    at all, on a file system that all ranks share.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    if grid.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _wait()
    entries = _write_own(partial, tensors, grid)
    everyone: list = [entries] * grid.world
    if grid.world > 1:
        dist.all_gather_object(everyone, entries)
    if grid.rank == 0:
        _publish(partial, folder, everyone, facts)
    _wait()


def _write_own(partial: Path, tensors: Iterable[tuple[str, Tensor]], grid: Grid) -> dict[str, dict]:
    """Writes this rank's share and returns {file name: {size, sha256, tensors: {name: {shape, dtype}}}}."""
    entries: dict[str, dict] = {}
    pending: dict[str, Tensor] = {}
    for i, (name, tensor) in enumerate(tensors):
        mine = grid.tensor_rank == 0 and i % grid.data == grid.data_rank
        if not mine:
            continue
        if pending and _bytes(pending.values()) + _bytes([tensor]) > BYTES_PER_FILE:
            entries |= _write_file(partial, pending, grid.rank, len(entries))
            pending = {}
        pending[name] = tensor.contiguous()
    return entries | _write_file(partial, pending, grid.rank, len(entries)) if pending else entries


def _write_file(partial: Path, tensors: dict[str, Tensor], rank: int, part: int) -> dict[str, dict]:
    name = f"weights-rank{rank:05d}-{part:03d}.safetensors"
    data = save(tensors)
    _write_synced(partial / name, data)
    described = {key: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for key, t in tensors.items()}
    return {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "tensors": described}}


def _publish(partial: Path, folder: Path, everyone: list[dict[str, dict]], facts: dict[str, Any]) -> None:
    files = {name: entry for entries in everyone for name, entry in sorted(entries.items())}
    tensors = {name: {**described, "file": file} for file, entry in files.items() for name, described in entry.pop("tensors").items()}
    manifest = {"format": FORMAT, **facts, "files": files, "tensors": tensors}
    _write_synced(partial / "manifest.json", json.dumps(manifest, indent=1).encode())
    _sync_folder(partial)
    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():  # the same step saved again: the older one gives way to a complete one only
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    partial.rename(folder)
    pointer = folder.with_name(".latest.partial")
    _write_synced(pointer, folder.name.encode())
    pointer.replace(folder.with_name("latest"))
    _sync_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def latest(checkpoints: Path) -> Path:
    """The newest complete checkpoint in a run's `checkpoints` folder."""
    pointer = checkpoints / "latest"
    if not pointer.is_file():
        raise Mistake(f"{checkpoints} holds no complete checkpoint → a run writes its first one when it ends")
    name = pointer.read_text().strip()
    replaced = f".{name}.replaced"  # where the same step was saved again and the writer died between the two renames
    for found in (name, replaced):
        if Path(found).name == found and (checkpoints / found).is_dir():
            return checkpoints / found
    raise Mistake(f"{pointer} names {name!r}, which is not a checkpoint beside it")


class Reader:
    """Reads whole logical tensors of a checkpoint, whatever layout wrote it. Its files may be hostile: nothing is executed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
            self.tensors: dict[str, dict] = self.manifest["tensors"]
            version = self.manifest["format"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise Mistake(f"{folder} is not a checkpoint: its manifest.json cannot be read ({error})") from error
        if version != FORMAT:
            raise Mistake(f"{folder} has format {version!r}, this version reads format {FORMAT}")
        for table, facts in ENTRIES.items():
            _check_entries(folder, table, self.manifest.get(table), facts)

    def read(self, name: str) -> Tensor:
        """The whole tensor `name`, fp32, on the CPU."""
        if name not in self.tensors:
            raise Mistake(f"{self.folder} holds no tensor {name} → it holds {len(self.tensors)}, e.g. {next(iter(self.tensors), 'none')}")
        file = self.tensors[name]["file"]
        if Path(file).name != file:
            raise Mistake(f"{self.folder}: the manifest places {name} outside of the checkpoint ({file!r})")
        try:
            with safe_open(self.folder / file, framework="pt") as opened:
                return opened.get_tensor(name)
        except (OSError, ValueError, SafetensorError) as error:
            raise Mistake(f"{self.folder / file} cannot be read: {error}") from error

    def check(self) -> None:
        """Compares every file's size and SHA-256 with the manifest; a difference is a Mistake naming the file and both."""
        for name, entry in self.manifest["files"].items():
            path = self.folder / Path(name).name
            size = path.stat().st_size if path.is_file() else None
            if size != entry["size"]:
                raise Mistake(
                    f"{path} is damaged: {'missing' if size is None else f'{size} bytes'}, the manifest says {entry['size']} bytes"
                )
            found = _sha256(path)
            if found != entry["sha256"]:
                raise Mistake(f"{path} is damaged: SHA-256 {found[:12]}…, the manifest says {entry['sha256'][:12]}…")

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)


def _check_entries(folder: Path, table: str, entries: Any, facts: dict[str, type]) -> None:
    """Refuse a table of the manifest that is not {name: {each of `facts`: a value of its type, …}}."""
    if not isinstance(entries, dict):
        raise Mistake(f"{folder} is not a checkpoint: {table} in its manifest.json is not a table → use another checkpoint of the run")
    for name, entry in entries.items():
        for fact, kind in facts.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(fact), kind):
                what = f"{table}[{name!r}] has no {fact} that is {kind.__name__}"
                raise Mistake(f"{folder} is not a checkpoint: {what} in its manifest.json → use another checkpoint of the run")


def load_weights(module: nn.Module, reader: Reader, grid: Grid) -> None:
    """Sets every parameter of a plain module to its slice of the checkpoint's tensor. Reads each tensor once; no collective."""
    with torch.no_grad():
        for name, parameter in unique_parameters(module):
            whole = reader.read(name)
            if tuple(whole.shape) != slice_of(parameter).shape:
                raise Mistake(f"{name} is {list(whole.shape)} in {reader.folder} and {list(slice_of(parameter).shape)} in this model")
            parameter.copy_(slice_of(parameter).cut(whole, grid.tensor_rank, grid.tensor))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()  # files are bounded by BYTES_PER_FILE or one tensor


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
