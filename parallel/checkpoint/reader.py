"""Reads of a checkpoint the regions that are asked for, whatever layout wrote it. Its files may be hostile: nothing is executed."""

import errno
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from parallel.checkpoint.folder import MANIFEST, hold, still_there
from parallel.checkpoint.manifest import MAX_BYTES, Logical, Manifest, OtherFormat, Piece, parse
from parallel.checkpoint.tensor_file import SAFETENSORS
from parallel.errors import Mistake
from parallel.files import sha256_of
from parallel.grid import Grid
from parallel.layers import unique_parameters
from parallel.slices import Slice, slice_of

Box = Sequence[tuple[int, int]]
"""For each dim of a logical tensor, where a region begins and ends."""
OPEN_AT_ONCE = 16
"""Files that stay open; each takes address space, not memory."""


class Reader:
    """One checkpoint. While it is open, `retain` in any process leaves the folder alone; close it, or use it in a `with`.

    A Mistake where the folder is no checkpoint. What is read is checked against the manifest in shape and dtype, not in content:
    that is `check`, which reads all.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._held = hold(folder)
        except OSError as error:
            what = f"{folder} is not a checkpoint: its {MANIFEST} cannot be read ({error.strerror})"
            raise Mistake(f"{what} → name a folder that a run has saved, such as …/checkpoints/step_000300") from error
        self._open: dict[str, Any] = {}
        try:
            self.manifest: Manifest = self._parsed()
        except BaseException:
            self.close()
            raise

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says beside its tables: step, samples, layout, …"""
        return self.manifest.facts

    @property
    def tensors(self) -> dict[str, Logical]:
        """The weights by logical name. Moments, where there are some, have the same names and shapes."""
        return self.manifest.tensors["weights"]

    def read(self, name: str, kind: str = "weights") -> Tensor:
        """The whole tensor `name`, fp32, on the CPU."""
        return self.read_region(name, [(0, size) for size in self._logical(name, kind).shape], kind)

    def read_rows(
        self, name: str, cut: Slice, rank: int, degree: int, rows: tuple[int, int] | None = None, kind: str = "weights"
    ) -> Tensor:
        """Rows [begin, end) of the slice that tensor rank `rank` of `degree` holds, all by default; padding is zero."""
        local = cut.local_shape(degree)
        begin, end = rows or (0, local[0])
        if cut.dim is None:
            return self.read_region(name, [(begin, end), *((0, size) for size in cut.shape[1:])], kind)
        found = torch.zeros((end - begin, *local[1:]))
        for region in cut.regions(rank, degree):
            box = [(begin, end), *((0, size) for size in cut.shape[1:])]
            first, last = region.local, region.local + region.length
            if cut.dim == 0:
                first, last = max(first, begin), min(last, end)
            if first < last:
                box[cut.dim] = (first - region.local + region.whole, last - region.local + region.whole)
                offset = begin if cut.dim == 0 else 0
                found.narrow(cut.dim, first - offset, last - first).copy_(self.read_region(name, box, kind))
        return found

    def read_region(self, name: str, box: Box, kind: str = "weights") -> Tensor:
        """A region of the whole tensor `name`, fp32, on the CPU."""
        tensor = self._logical(name, kind)
        found: Tensor | None = None
        for piece in tensor.pieces:
            begin, end = box[piece.dim]
            first, last = max(begin, piece.start), min(end, piece.start + piece.length)
            if first >= last:
                continue
            within = list(box)
            within[piece.dim] = (first - piece.start, last - piece.start)
            values = self._read_piece(piece, tensor, within)
            if (first, last) == (begin, end):
                return values
            found = torch.empty([end - begin for begin, end in box]) if found is None else found
            found.narrow(piece.dim, first - begin, last - first).copy_(values)
        return torch.empty([end - begin for begin, end in box]) if found is None else found

    def check(self, share: int = 0, of: int = 1) -> None:
        """Compares size and SHA-256 of every file with the manifest; a difference is a Mistake naming the file and both.

        `share` of `of`: every `of`-th file, so that ranks can share the work.
        """
        for name in sorted(self.manifest.files)[share::of]:
            self._check_file(name)

    def read_file(self, name: str, at_most: int = MAX_BYTES) -> bytes:
        """A file of the checkpoint that holds no tensors."""
        path = self._path(name)
        try:
            with path.open("rb") as file:
                return file.read(at_most)
        except OSError as error:
            raise self._unreadable(path, error) from error

    def close(self) -> None:
        """Lets go of the files; from now on `retain` may delete the checkpoint."""
        self._open.clear()
        self._held.close()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def _parsed(self) -> Manifest:
        text = self._held.read(MAX_BYTES + 1)
        try:
            if len(text) > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES} bytes")
            return parse(text)
        except ValueError as error:
            way_out = "use the version that wrote it" if isinstance(error, OtherFormat) else "use another checkpoint of its run"
            raise Mistake(f"{self.folder} is not a checkpoint that can be read: {error} ({MANIFEST}) → {way_out}") from error

    def _logical(self, name: str, kind: str) -> Logical:
        table = self.manifest.tensors.get(kind)
        if table is None:
            held = ", ".join(self.manifest.tensors)
            raise Mistake(f"{self.folder} holds no {kind}, only {held} → use a checkpoint that a training run wrote")
        if name not in table:
            raise Mistake(f"{self.folder} holds no tensor {name} → it holds {len(table)}, e.g. {next(iter(table))}")
        return table[name]

    def _read_piece(self, piece: Piece, tensor: Logical, within: Box) -> Tensor:
        try:
            found = self._opened(piece.file).get_slice(piece.key)
            told = (found.get_dtype(), tuple(found.get_shape()))
            expected = (SAFETENSORS[tensor.dtype], piece.shape(tensor.shape))
            if told != expected:
                raise Mistake(f"{self.folder / piece.file}: {piece.key} is {told}, the manifest says {expected} → use another checkpoint")
            return found[tuple(slice(begin, end) for begin, end in within)]
        except (OSError, SafetensorError) as error:
            raise self._unreadable(self.folder / piece.file, error) from error

    def _opened(self, name: str) -> Any:
        if name not in self._open:
            while len(self._open) >= OPEN_AT_ONCE:
                del self._open[next(iter(self._open))]
            self._open[name] = safe_open(self._path(name), framework="pt")
            if not still_there(self.folder, self._held):
                raise Mistake(f"{self.folder} was replaced by another one of its name while it was read → read it again")
        return self._open[name]

    def _path(self, name: str) -> Path:
        """Where `name` lies. Only a regular file is one: a pipe would be waited on for ever."""
        path = self.folder / name
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise OSError(errno.EINVAL, "not a file")
        except OSError as error:
            raise self._unreadable(path, error) from error
        return path

    def _check_file(self, name: str) -> None:
        path, expected = self.folder / name, self.manifest.files[name]
        size = path.stat().st_size if path.is_file() else None
        if size != expected.size:
            found = "missing" if size is None else f"{size} bytes"
            raise Mistake(f"{path} is damaged: {found}, the manifest says {expected.size} bytes → use another checkpoint of the run")
        try:
            found = sha256_of(path)
        except OSError as error:
            raise self._unreadable(path, error) from error
        if found != expected.sha256:
            told = f"SHA-256 {found[:12]}…, the manifest says {expected.sha256[:12]}…"
            raise Mistake(f"{path} is damaged: {told} → use another checkpoint of the run")

    def _unreadable(self, path: Path, error: Exception) -> Mistake:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return Mistake(f"{path} cannot be read: {reason} → use another checkpoint of the run")


def load_weights(module: nn.Module, reader: Reader, grid: Grid) -> None:
    """Sets every parameter of a plain module to its slice of the checkpoint's weights, read from where it lies. No collective."""
    with torch.no_grad():
        for name, parameter in unique_parameters(module):
            cut = slice_of(parameter)
            check_shape(name, cut.shape, reader)
            parameter.copy_(reader.read_rows(name, cut, grid.tensor_rank, grid.tensor))


def check_shape(name: str, shape: tuple[int, ...], reader: Reader) -> None:
    """A Mistake where the model's tensor has another shape than the checkpoint's, or the checkpoint has none."""
    found = reader._logical(name, "weights").shape
    if found != shape:
        raise Mistake(f"{name} is {list(found)} in {reader.folder} and {list(shape)} in this model → use the model it was trained with")
