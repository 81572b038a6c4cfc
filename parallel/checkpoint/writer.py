"""One checkpoint while it is written: each rank its own files, then all together one manifest, one rename; or nothing at all.

A rank that cannot write goes on walking with the others, says so where they meet, and all of them raise.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from parallel.checkpoint.folder import begin, hidden, publish
from parallel.checkpoint.manifest import KINDS, File, Logical, Manifest, Piece, parse
from parallel.checkpoint.tensor_file import Entry, TensorFile
from parallel.errors import Mistake
from parallel.files import disk_trouble, write_synced
from parallel.grid import Grid
from parallel.object_collectives import all_gather_objects, gather_objects, together

BYTES_PER_FILE = 256 * 2**20
"""Files are cut at this size, or hold one part that is larger."""
GENERATORS = "generators.json"
"""The random generators of every rank, in rank order."""


@dataclass(frozen=True)
class Part:
    """Rows [start, start + length) along `dim` of the logical tensor `name`, of the shape `whole`, of one of KINDS: what a rank writes."""

    kind: str
    name: str
    whole: tuple[int, ...]
    dim: int
    start: int
    length: int

    @property
    def entry(self) -> Entry:
        """As a tensor of a file. The key of less than the whole says which rows: `head.weight[0:4096]`, `mlp.down.weight[:,0:64]`."""
        shape = (*self.whole[: self.dim], self.length, *self.whole[self.dim + 1 :])
        rows = f"[{':,' * self.dim}{self.start}:{self.start + self.length}]"
        return Entry(self.name if self.length == self.whole[self.dim] else self.name + rows, shape)


Plan = dict[str, list[Part]]
"""A rank's files, and what each holds, in order."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has been published: its folder, the bytes of its tensors on all ranks, the seconds since it was begun."""

    folder: Path
    size: int
    seconds: float


class Writing:
    """The checkpoint `folder`, begun: hidden, with room for what all ranks are to write. `parts` are this rank's, in order.

    `facts` go into the manifest. `generators`: this rank's random generators, for a checkpoint that can be resumed.
    Collective to make and to publish; `write` is each rank's own.
    """

    def __init__(self, folder: Path, parts: Sequence[Part], facts: dict[str, Any], grid: Grid, generators: Any = None) -> None:
        self.folder, self.facts, self.grid, self.generators = folder, facts, grid, generators
        self.partial, self.started = hidden(folder, "partial"), time.monotonic()
        self.plan = files_of(parts, grid.rank)
        self.need = sum(all_gather_objects(sum(part.entry.size for part in parts), grid))
        self.files: dict[str, File] = {}
        self.error: Exception | None = None
        self._left = list(self.plan)
        self._file: TensorFile | None = None
        with together(grid):
            if grid.rank == 0:
                begin(folder, self.need)

    def write(self, tensor: Tensor) -> None:
        """Writes the next part's tensor, on the CPU. Never raises: after an error it does nothing, until `published` tells."""
        with self.remembering():
            if self._file is None:
                name = self._left[0]
                self._file = TensorFile(self.partial / name, [part.entry for part in self.plan[name]])
            self._file.add(tensor)
            if not self._file.waiting:
                self.files[self._left.pop(0)] = self._file.close()
                self._file = None

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """Keeps the first error of its body for `published`; after one, errors are what is to be expected."""
        try:
            with disk_trouble(self.partial, self.need):
                yield
        except Exception as error:
            self.error = self.error or error

    def published(self) -> Saved:
        """Waits for all ranks; the checkpoint is there, or an error raised by all of them and nothing is left of it. Collective."""
        try:
            with together(self.grid):
                self._check_complete()
            told = gather_objects((self.files, self.plan, self.generators), self.grid)
            with together(self.grid):
                if self.grid.rank == 0:
                    self._publish(told)
        except Exception:
            if self.grid.rank == 0:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise
        return Saved(self.folder, self.need, time.monotonic() - self.started)

    def abandon(self) -> None:
        """Removes what has been written; nothing may be written or published after it. Not collective."""
        if self._file is not None:
            self._file.abandon()
        shutil.rmtree(self.partial, ignore_errors=True)

    def _check_complete(self) -> None:
        if self.error is None and self._left:
            self.error = RuntimeError(f"{self._left[0]} was to be written and was not")
        if self.error is not None:
            if self._file is not None:
                self._file.abandon()
            raise self.error

    def _publish(self, told: list[tuple[dict[str, File], Plan, Any]]) -> None:
        """On rank 0, which has everyone's files, plans and generators."""
        files = {name: file for written, _, _ in told for name, file in written.items()}
        self._check_shared(files)
        if self.generators is not None:
            with disk_trouble(self.partial, self.need):
                ranks = json.dumps([generators for _, _, generators in told]).encode()
                write_synced(self.partial / GENERATORS, ranks)
                files[GENERATORS] = File(len(ranks), hashlib.sha256(ranks).hexdigest())
        manifest = Manifest(self.facts, files, logical_tensors(told)).text()
        parse(manifest.encode())  # what is published can be read
        publish(self.partial, self.folder, manifest)

    def _check_shared(self, files: dict[str, File]) -> None:
        """What the ranks wrote is seen from here; it is not where their disks are their own."""
        for name, file in files.items():
            path = self.partial / name
            if not path.is_file() or path.stat().st_size != file.size:
                raise Mistake(f"{name}, which another rank has written, is not in {self.partial} → write to a disk that all ranks share")


def write(folder: Path, shapes: Mapping[str, tuple[int, ...]], weights: Iterable[Tensor], facts: dict[str, Any]) -> Saved:
    """Writes whole fp32 tensors from one process: a checkpoint that can be read, or begun with, not resumed. `facts` hold a step.

    `shapes` by logical name; `weights` in that order, taken one at a time. Nothing is left where taking one raises.
    """
    writing = Writing(folder, [Part("weights", name, shape, 0, 0, shape[0]) for name, shape in shapes.items()], facts, Grid())
    try:
        for tensor in weights:
            writing.write(tensor)
    except BaseException:
        writing.abandon()
        raise
    return writing.published()


def files_of(parts: Sequence[Part], rank: int) -> Plan:
    """Deals the parts of a rank out to files of one kind each, cut at BYTES_PER_FILE."""
    plan: Plan = {}
    for kind in KINDS:
        size = BYTES_PER_FILE
        for part in (part for part in parts if part.kind == kind):
            size += part.entry.size
            if size > BYTES_PER_FILE:
                number = sum(name.startswith(f"{kind}-") for name in plan)
                name, size = f"{kind}-rank{rank:05d}-{number:03d}.safetensors", part.entry.size
                plan[name] = []
            plan[name].append(part)
    return plan


def logical_tensors(told: list[tuple[dict[str, File], Plan, Any]]) -> dict[str, dict[str, Logical]]:
    """The manifest's table of tensors, from every rank's plan."""
    pieces: dict[tuple[str, str], list[Piece]] = {}
    wholes: dict[tuple[str, str], tuple[int, ...]] = {}
    for _, plan, _ in told:
        for file, parts in plan.items():
            for part in parts:
                piece = Piece(file, part.entry.key, part.dim, part.start, part.length)
                pieces.setdefault((part.kind, part.name), []).append(piece)
                wholes[part.kind, part.name] = part.whole
    tables: dict[str, dict[str, Logical]] = {}
    for (kind, name), found in pieces.items():
        in_order = tuple(sorted(found, key=lambda piece: piece.start))
        tables.setdefault(kind, {})[name] = Logical(wholes[kind, name], "float32", in_order)
    return tables
