"""Writes one checkpoint: each rank writes its own files, then all publish them with one manifest and one rename, or nothing at all.

A rank that cannot write continues to take part in the collectives, reports its error when all meet, and then every rank raises.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from parallel.checkpoint.folder import begin, hidden, publish
from parallel.checkpoint.manifest import File, Logical, Manifest, Piece, parse
from parallel.checkpoint.tensor_file import Entry, TensorFile
from parallel.errors import Mistake
from parallel.files import disk_trouble, write_synced
from parallel.grid import Grid
from parallel.object_collectives import all_gather_objects, gather_objects, together

BYTES_PER_FILE = 256 * 2**20
"""The largest size of a file by default, unless it holds a single part that is larger."""
GENERATORS = "generators.json"
"""The random generators of every rank, in rank order."""


@dataclass(frozen=True)
class Part:
    """Rows [start, start + length) along `dim` of a logical tensor of the shape `whole`, of one kind. A rank writes it at once."""

    kind: str
    name: str
    whole: tuple[int, ...]
    dim: int
    start: int
    length: int

    @property
    def entry(self) -> Entry:
        """The part as a tensor of a file. The key of a part of a tensor has its rows: `head.weight[0:4096]`, `mlp.down.weight[:,0:64]`."""
        shape = (*self.whole[: self.dim], self.length, *self.whole[self.dim + 1 :])
        rows = f"[{':,' * self.dim}{self.start}:{self.start + self.length}]"
        return Entry(self.name if self.length == self.whole[self.dim] else self.name + rows, shape)


Plan = dict[str, list[Part]]
"""A rank's files and the parts that each holds, in order."""


@dataclass(frozen=True)
class Saved:
    """A published checkpoint: its folder, the bytes of its tensors on all ranks, the seconds that it took."""

    folder: Path
    size: int
    seconds: float


class CheckpointWriter:
    """Writes the checkpoint `folder` under a hidden name until it is complete. `parts` are those of this rank, in order.

    `facts` go into the manifest. `generators` are this rank's random generators, for a checkpoint that can be resumed.
    `check` is called by rank 0 before anything is made and before it is published: it raises if that is not allowed any more.
    The constructor, which checks that all ranks' parts fit on the disk, and `finish` are collective; `write` is not.
    """

    def __init__(
        self,
        folder: Path,
        parts: Sequence[Part],
        facts: dict[str, Any],
        grid: Grid,
        generators: Any = None,
        bytes_per_file: int = BYTES_PER_FILE,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.check = check
        self.folder, self.facts, self.grid, self.generators = folder, facts, grid, generators
        self.partial, self.started = hidden(folder, "partial"), time.monotonic()
        self.plan = files_of(parts, grid.rank, bytes_per_file)
        self.need = sum(all_gather_objects(sum(part.entry.size for part in parts), grid))
        self.files: dict[str, File] = {}
        self.error: Exception | None = None
        self._left = list(self.plan)
        self._file: TensorFile | None = None
        with together(grid):
            if grid.rank == 0:
                check()
                begin(folder, self.need)

    def write(self, tensor: Tensor) -> None:
        """Writes the next part's tensor, which is on the CPU. Never raises: after an error it does nothing, and `finish` raises it."""
        with self.keeping_error():
            if self._file is None:
                name = self._left[0]
                self._file = TensorFile(self.partial / name, [part.entry for part in self.plan[name]])
            self._file.add(tensor)
            if not self._file.waiting:
                self.files[self._left.pop(0)] = self._file.close()
                self._file = None

    @contextlib.contextmanager
    def keeping_error(self) -> Iterator[None]:
        """Keeps the first error of the `with` block for `finish`. Later errors are usually its consequences."""
        try:
            with disk_trouble(self.partial, self.need):
                yield
        except Exception as error:
            self.error = self.error or error

    def finish(self) -> Saved:
        """Waits for all ranks and publishes the checkpoint; or all ranks raise an error, and nothing is left of it. Collective."""
        try:
            with together(self.grid):
                if self.error is None and self._left:
                    self.error = RuntimeError(f"{self._left[0]} was to be written and was not")
                if self.error is not None:
                    if self._file is not None:
                        self._file.abandon()
                    raise self.error
            by_rank = gather_objects((self.files, self.plan, self.generators), self.grid)
            with together(self.grid):
                if self.grid.rank == 0:
                    self._publish(by_rank)
        except Exception:
            if self.grid.rank == 0:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise
        return Saved(self.folder, self.need, time.monotonic() - self.started)

    def abandon(self) -> None:
        """Removes the files written so far; the writer must not be used afterwards. Not collective."""
        if self._file is not None:
            self._file.abandon()
        shutil.rmtree(self.partial, ignore_errors=True)

    def _publish(self, by_rank: list[tuple[dict[str, File], Plan, Any]]) -> None:
        """Writes the manifest and renames the folder; on rank 0, from every rank's files, plan and generators."""
        files = {name: file for written, _, _ in by_rank for name, file in written.items()}
        # Rank 0 sees the files of all ranks, unless their disks are separate.
        for name, file in files.items():
            path = self.partial / name
            if not path.is_file() or path.stat().st_size != file.size:
                raise Mistake(f"{name}, which another rank has written, is not in {self.partial} → write to a disk that all ranks share")
        if self.generators is not None:
            with disk_trouble(self.partial, self.need):
                data = json.dumps([generators for _, _, generators in by_rank]).encode()
                write_synced(self.partial / GENERATORS, data)
                files[GENERATORS] = File(len(data), hashlib.sha256(data).hexdigest())
        manifest = Manifest(self.facts, files, logical_tensors([plan for _, plan, _ in by_rank])).text()
        parse(manifest.encode())  # only a manifest that can be read is published
        self.check()
        publish(self.partial, self.folder, manifest)


def write(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    weights: Iterable[Tensor],
    facts: dict[str, Any],
    bytes_per_file: int = BYTES_PER_FILE,
) -> Saved:
    """Writes a checkpoint of whole fp32 tensors from one process. It can be read, or begun with, but not resumed.

    `shapes` are by logical name; `weights` are in that order and taken one at a time. `facts` contain `step`. If taking a tensor
    raises, nothing is left of the checkpoint.
    """
    parts = [Part("weights", name, shape, 0, 0, shape[0]) for name, shape in shapes.items()]
    writer = CheckpointWriter(folder, parts, facts, Grid(), bytes_per_file=bytes_per_file)
    try:
        for tensor in weights:
            writer.write(tensor)
    except BaseException:
        writer.abandon()
        raise
    return writer.finish()


def files_of(parts: Sequence[Part], rank: int, bytes_per_file: int = BYTES_PER_FILE) -> Plan:
    """Distributes the parts of a rank over files of one kind each and of at most `bytes_per_file`, unless one part is larger."""
    plan: Plan = {}
    for kind in dict.fromkeys(part.kind for part in parts):
        size = bytes_per_file
        for part in (part for part in parts if part.kind == kind):
            size += part.entry.size
            if size > bytes_per_file:
                number = sum(name.startswith(f"{kind}-") for name in plan)
                name, size = f"{kind}-rank{rank:05d}-{number:03d}.safetensors", part.entry.size
                plan[name] = []
            plan[name].append(part)
    return plan


def logical_tensors(plans: Sequence[Plan]) -> dict[str, dict[str, Logical]]:
    """The manifest's table of tensors, from every rank's plan."""
    pieces: dict[tuple[str, str], list[Piece]] = {}
    wholes: dict[tuple[str, str], tuple[int, ...]] = {}
    for plan in plans:
        for file, parts in plan.items():
            for part in parts:
                piece = Piece(file, part.entry.key, part.dim, part.start, part.length)
                pieces.setdefault((part.kind, part.name), []).append(piece)
                wholes[part.kind, part.name] = part.whole
    tables: dict[str, dict[str, Logical]] = {}
    for (kind, name), unordered in pieces.items():
        in_order = tuple(sorted(unordered, key=lambda piece: piece.start))
        tables.setdefault(kind, {})[name] = Logical(wholes[kind, name], "float32", in_order)
    return tables
