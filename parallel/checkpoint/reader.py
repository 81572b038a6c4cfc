"""Reads any region of a checkpoint's tensors, independent of the layout that wrote it. Files are not trusted: nothing is executed."""

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
from parallel.errors import Damaged, Mistake
from parallel.files import sha256_of
from parallel.grid import Grid
from parallel.layers import unique_parameters
from parallel.regular_files import open_regular
from parallel.slices import Slice, slice_of

Box = Sequence[tuple[int, int]]
"""Begin and end of a region along each dim of a logical tensor."""
OPEN_AT_ONCE = 16
"""The largest number of files that a reader keeps open by default. Each takes address space, not memory."""


class Reader:
    """An open checkpoint. While it is open, `retain` in any process keeps the folder; close it, or use it in a `with` statement.

    A Mistake if the folder is not a checkpoint. Tensors are checked against the manifest in shape and dtype when they are read;
    `check` reads all files and compares their hashes. At most `open_at_once` files are open at a time.
    """

    def __init__(self, folder: Path, open_at_once: int = OPEN_AT_ONCE) -> None:
        self.folder, self.open_at_once = folder, open_at_once
        try:
            self._held = hold(folder)
        except OSError as error:
            what = f"{folder} is not a checkpoint: its {MANIFEST} cannot be read ({error.strerror})"
            raise Mistake(f"{what} → name a folder that a run has saved, such as …/checkpoints/step_000300") from error
        self._open: dict[str, Any] = {}
        try:
            text = self._held.read(MAX_BYTES + 1)
            if len(text) > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES} bytes")
            self.manifest: Manifest = parse(text)
        except ValueError as error:
            self.close()
            kind: type[Mistake] = Damaged
            way_out = "use another checkpoint of its run"
            if isinstance(error, OtherFormat):
                kind, way_out = Mistake, "use the version that wrote it"
            raise kind(f"{self.folder} is not a checkpoint that can be read: {error} ({MANIFEST}) → {way_out}") from error
        except BaseException:
            self.close()
            raise

    @property
    def facts(self) -> dict[str, Any]:
        """The manifest's entries besides its tables: step, samples, layout, …"""
        return self.manifest.facts

    @property
    def tensors(self) -> dict[str, Logical]:
        """The weights by logical name. Moments, if there are any, have the same names and shapes."""
        return self.manifest.tensors["weights"]

    def read(self, name: str, kind: str = "weights") -> Tensor:
        """The whole tensor `name`, fp32, on the CPU."""
        return self.read_region(name, [(0, size) for size in self._logical(name, kind).shape], kind)

    def read_rows(
        self, name: str, cut: Slice, rank: int, degree: int, rows: tuple[int, int] | None = None, kind: str = "weights"
    ) -> Tensor:
        """Rows [begin, end) of the slice that tensor rank `rank` of `degree` holds; all rows by default. Padding is zero."""
        local = cut.local_shape(degree)
        begin, end = rows or (0, local[0])
        if cut.dim is None:
            return self.read_region(name, [(begin, end), *((0, size) for size in cut.shape[1:])], kind)
        result = torch.zeros((end - begin, *local[1:]))
        for region in cut.regions(rank, degree):
            box = [(begin, end), *((0, size) for size in cut.shape[1:])]
            first, last = region.local, region.local + region.length
            if cut.dim == 0:
                first, last = max(first, begin), min(last, end)
            if first < last:
                box[cut.dim] = (first - region.local + region.whole, last - region.local + region.whole)
                offset = begin if cut.dim == 0 else 0
                result.narrow(cut.dim, first - offset, last - first).copy_(self.read_region(name, box, kind))
        return result

    def read_region(self, name: str, box: Box, kind: str = "weights") -> Tensor:
        """A region of the whole tensor `name`, fp32, on the CPU."""
        tensor = self._logical(name, kind)
        region: Tensor | None = None
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
            region = torch.empty([end - begin for begin, end in box]) if region is None else region
            region.narrow(piece.dim, first - begin, last - first).copy_(values)
        return torch.empty([end - begin for begin, end in box]) if region is None else region

    def check(self, share: int = 0, of: int = 1) -> None:
        """Compares size and SHA-256 of every file with the manifest; a difference raises Damaged with the file and both values.

        With `share` and `of`, only every `of`-th file is checked, so that ranks can divide the work.
        """
        for name in sorted(self.manifest.files)[share::of]:
            path, expected = self.folder / name, self.manifest.files[name]
            size = path.stat().st_size if path.is_file() else None
            if size != expected.size:
                actual = "missing" if size is None else f"{size} bytes"
                raise Damaged(f"{path} is damaged: {actual}, the manifest says {expected.size} bytes → use another checkpoint of the run")
            try:
                sha256 = sha256_of(path)
            except OSError as error:
                raise self._unreadable(path, error) from error
            if sha256 != expected.sha256:
                both = f"SHA-256 {sha256[:12]}…, the manifest says {expected.sha256[:12]}…"
                raise Damaged(f"{path} is damaged: {both} → use another checkpoint of the run")

    def read_file(self, name: str, at_most: int = MAX_BYTES) -> bytes:
        """The content of a file of the checkpoint that holds no tensors."""
        path = self._path(name)
        try:
            with open_regular(path) as file:
                return file.read(at_most)
        except OSError as error:
            raise self._unreadable(path, error) from error

    def close(self) -> None:
        """Closes the files. From now on `retain` may delete the checkpoint."""
        self._open.clear()
        self._held.close()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def _logical(self, name: str, kind: str) -> Logical:
        """The manifest's entry of a tensor; a Mistake if there is none."""
        table = self.manifest.tensors.get(kind)
        if table is None:
            kinds = ", ".join(self.manifest.tensors)
            raise Mistake(f"{self.folder} holds no {kind}, only {kinds} → use a checkpoint that a training run wrote")
        if name not in table:
            raise Mistake(f"{self.folder} holds no tensor {name} → it holds {len(table)}, e.g. {next(iter(table))}")
        return table[name]

    def _read_piece(self, piece: Piece, tensor: Logical, within: Box) -> Tensor:
        """The region `within` of a piece, from its file."""
        try:
            stored = self._opened(piece.file).get_slice(piece.key)
            actual = (stored.get_dtype(), tuple(stored.get_shape()))
            expected = (SAFETENSORS[tensor.dtype], piece.shape(tensor.shape))
            if actual != expected:
                raise Damaged(f"{self.folder / piece.file}: {piece.key} is {actual}, the manifest says {expected} → use another checkpoint")
            return stored[tuple(slice(begin, end) for begin, end in within)]
        except (OSError, SafetensorError) as error:
            raise self._unreadable(self.folder / piece.file, error) from error

    def _opened(self, name: str) -> Any:
        """The file `name`, open with safetensors; the one opened first is closed if there are too many."""
        if name not in self._open:
            while len(self._open) >= self.open_at_once:
                del self._open[next(iter(self._open))]
            self._open[name] = safe_open(self._path(name), framework="pt")
            if not still_there(self.folder, self._held):
                raise Mistake(f"{self.folder} was replaced by another one of its name while it was read → read it again")
        return self._open[name]

    def _path(self, name: str) -> Path:
        """The path of the file `name`, which must be a regular file: opening a pipe would block for ever."""
        path = self.folder / name
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise OSError(errno.EINVAL, "not a file")
        except OSError as error:
            raise self._unreadable(path, error) from error
        return path

    def _unreadable(self, path: Path, error: Exception) -> Damaged:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return Damaged(f"{path} cannot be read: {reason} → use another checkpoint of the run")


def load_weights(module: nn.Module, reader: Reader, grid: Grid) -> None:
    """Sets every parameter of a plain module to its slice of the checkpoint's weights. Only that slice is read. Not collective."""
    with torch.no_grad():
        for name, parameter in unique_parameters(module):
            cut = slice_of(parameter)
            check_shape(name, cut.shape, reader)
            parameter.copy_(reader.read_rows(name, cut, grid.tensor_rank, grid.tensor))


def check_shape(name: str, shape: tuple[int, ...], reader: Reader) -> None:
    """Raises a Mistake if the checkpoint has no tensor `name`, or one of another shape than the model's."""
    saved = reader._logical(name, "weights").shape
    if saved != shape:
        raise Mistake(f"{name} is {list(saved)} in {reader.folder} and {list(shape)} in this model → use the model it was trained with")
