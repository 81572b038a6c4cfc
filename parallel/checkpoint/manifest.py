"""The manifest of a checkpoint: its facts, every file's size and SHA-256, and where the pieces of each logical tensor lie.

    {"format": 2, "step": 300, …facts…,
     "files": {"weights-rank00000-000.safetensors": {"size": 1234, "sha256": "…"}, …},
     "tensors": {"weights": {"head.weight": {"shape": [8192, 192], "dtype": "float32", "pieces": [
         {"file": "weights-rank00000-000.safetensors", "key": "head.weight[0:4096]", "dim": 0, "start": 0, "length": 4096}, …]}, …},
                 "exp_avg": …, "exp_avg_sq": …},
     "sha256": "…"}                                        of the rest of the manifest: detects a flipped bit

Converts text to objects and back; it opens no files. A manifest is not trusted: `parse` accepts one only if its file names contain
no path, its pieces fit into those files, and they cover every tensor exactly once.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from parallel.engines.deepspeed_config import STATE_NAME
from parallel.regular_files import parsed_json

MANIFEST = "manifest.json"
FORMAT = 2
WEIGHTS = "weights"
"""fp32 master weights. Any other kind of tensor is a part of the optimizer's state, by the optimizer's own name: Adam's moments are
exp_avg and exp_avg_sq. A checkpoint with weights only can be read but not resumed."""
DTYPES = {"float32": 4}
"""dtype -> bytes per element."""
MAX_BYTES, MOST_VALUES = 64 * 2**20, 2**21
"""The largest manifest that is read, in bytes and in values. That of a model of 128 blocks on 8 tensor ranks has about 10 MB."""
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_SIZE = 2**60
TABLES = ("format", "files", "tensors", "sha256")
COUNTS = ("step", "samples", "tokens")
"""Facts that are counts if present; `step` is always present."""


@dataclass(frozen=True)
class File:
    """Size and hash of a file of the checkpoint."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Piece:
    """Rows [start, start + length) along `dim` of a logical tensor, all of its other dims: the tensor `key` of `file`."""

    file: str
    key: str
    dim: int
    start: int
    length: int

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The piece's shape, if the logical tensor's shape is `whole`."""
        return (*whole[: self.dim], self.length, *whole[self.dim + 1 :])


@dataclass(frozen=True)
class Logical:
    """A logical tensor: its whole shape, unpadded, and the pieces that cover it, in order."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Elements of the whole."""
        return prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's facts, files {name: File} and tensors {kind: {logical name: Logical}}."""

    facts: dict[str, Any]
    files: dict[str, File]
    tensors: dict[str, dict[str, Logical]]

    def text(self) -> str:
        """The manifest as JSON, one file or tensor per line. A fact must not have the name of a table."""
        if taken := set(self.facts) & set(TABLES):
            raise ValueError(f"a checkpoint's facts cannot be called {', '.join(sorted(taken))}")
        tensors = {kind: {name: asdict(tensor) for name, tensor in table.items()} for kind, table in self.tensors.items()}
        tables = {"files": {name: asdict(file) for name, file in self.files.items()}, "tensors": tensors}
        facts = json.dumps({"format": FORMAT, **self.facts}, indent=1, allow_nan=False)
        sha256 = digest(json.loads(facts) | json.loads(json.dumps(tables)))  # of what will be read: tuples become lists
        kinds = ",\n".join(f'  "{kind}": {_lines(table)}' for kind, table in tensors.items())
        head = facts.removesuffix("\n}")
        return f'{head},\n "files": {_lines(tables["files"])},\n "tensors": {{\n{kinds}\n }},\n "sha256": "{sha256}"\n}}\n'


class OtherFormat(ValueError):
    """The manifest has another format version."""


def digest(table: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own `sha256`: the hash of its compact JSON with sorted keys."""
    return hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _lines(table: dict[str, Any]) -> str:
    """A JSON object with one entry per line."""
    return "{\n" + ",\n".join(f"   {json.dumps(name)}: {json.dumps(entry)}" for name, entry in table.items()) + "\n  }"


def parse(text: bytes) -> Manifest:
    """Parses and checks a manifest. A ValueError says what is wrong with it."""
    table = parsed_json(text, MOST_VALUES, _without_duplicates)
    _require(isinstance(table, dict), "it is not a table")
    _require("format" in table, "it has no format")
    version = table["format"]
    if version != FORMAT or isinstance(version, bool):
        raise OtherFormat(f"it has format {version!r:.40}, this version reads format {FORMAT}")
    _require(table.pop("sha256", None) == digest(table), "its own sha256 is not that of what it says: it is damaged")
    facts = {name: value for name, value in table.items() if name not in TABLES}
    _require("step" in facts, "it has no step")
    for name in COUNTS:
        _require(_is_size(facts.get(name, 0)), f"its {name} is not a count: {facts.get(name)!r:.40}")
    files = {name: _file(name, entry) for name, entry in _table(table, "files").items()}
    tensors = {kind: _tensors(kind, entries, files) for kind, entries in _table(table, "tensors").items()}
    _check_kinds(tensors)
    _check_room(files, tensors)
    return Manifest(facts, files, tensors)


def _file(name: str, entry: Any) -> File:
    _require(FILE_NAME.fullmatch(name) is not None, f"{name!r:.80} is not a plain file name")
    entry = _entry(f"files[{name!r}]", entry, {"size", "sha256"})
    _require(_is_size(entry["size"]), f"files[{name!r}] has the size {entry['size']!r:.40}")
    _require(isinstance(entry["sha256"], str) and SHA256.fullmatch(entry["sha256"]) is not None, f"files[{name!r}] has no SHA-256")
    return File(**entry)


def _tensors(kind: str, entries: Any, files: dict[str, File]) -> dict[str, Logical]:
    _require(STATE_NAME.fullmatch(kind) is not None, f"{kind!r:.80} is not the name of an optimizer's state")
    _require(isinstance(entries, dict) and len(entries) > 0, f"tensors[{kind!r}] is not a table of tensors")
    return {name: _logical(f"{kind} of {name!r:.200}", entry, files) for name, entry in entries.items()}


def _logical(what: str, entry: Any, files: dict[str, File]) -> Logical:
    entry = _entry(what, entry, {"shape", "dtype", "pieces"})
    shape, dtype, pieces = entry["shape"], entry["dtype"], entry["pieces"]
    sane = isinstance(shape, list) and 1 <= len(shape) <= 8 and all(_is_size(size) and size > 0 for size in shape)
    _require(sane, f"{what} has the shape {shape!r:.80}")
    _require(isinstance(dtype, str) and dtype in DTYPES, f"{what} has the unknown dtype {dtype!r:.40}")
    _require(isinstance(pieces, list) and len(pieces) > 0, f"{what} has no list of pieces")
    tensor = Logical(tuple(shape), dtype, tuple(_piece(what, piece, files) for piece in pieces))
    _check_tiling(what, tensor)
    return tensor


def _piece(what: str, entry: Any, files: dict[str, File]) -> Piece:
    entry = _entry(f"a piece of {what}", entry, {"file", "key", "dim", "start", "length"})
    file = entry["file"]
    _require(isinstance(file, str) and file in files, f"{what} lies in {file!r:.80}, which is not among the files")
    _require(isinstance(entry["key"], str) and 0 < len(entry["key"]) <= 1000, f"a piece of {what} has no key")
    _require(all(_is_size(entry[name]) for name in ("dim", "start", "length")), f"a piece of {what} is not placed by three counts")
    return Piece(**entry)


def _check_tiling(what: str, tensor: Logical) -> None:
    """Requires that the pieces are cut along one dim and follow one another from the beginning of the tensor to its end."""
    dim = tensor.pieces[0].dim
    _require(dim < len(tensor.shape) and all(piece.dim == dim for piece in tensor.pieces), f"{what} is not cut along one of its dims")
    end = 0
    for piece in sorted(tensor.pieces, key=lambda piece: (piece.start, piece.length)):
        _require(piece.start <= end, f"{what} lacks {end}:{piece.start} along dim {dim}")
        _require(piece.start >= end, f"{what} has {piece.start}:{end} along dim {dim} twice")
        _require(piece.length > 0, f"{what} has an empty piece")
        end = piece.start + piece.length
    _require(end >= tensor.shape[dim], f"{what} lacks {end}:{tensor.shape[dim]} along dim {dim}")
    _require(end == tensor.shape[dim], f"{what} ends at {tensor.shape[dim]} along dim {dim}, its pieces at {end}")


def _check_kinds(tensors: dict[str, dict[str, Logical]]) -> None:
    """Requires weights, and that every part of the optimizer's state is of the same tensors."""
    _require(WEIGHTS in tensors, f"it holds {', '.join(tensors) or 'nothing'}, but no weights")
    shapes = {kind: {name: tensor.shape for name, tensor in table.items()} for kind, table in tensors.items()}
    for kind, shapes_of_kind in shapes.items():
        _require(shapes_of_kind == shapes[WEIGHTS], f"{kind} are not of the same tensors as the weights")


def _check_room(files: dict[str, File], tensors: dict[str, dict[str, Logical]]) -> None:
    """Requires that no tensor of a file is used twice, and that every file is long enough for its pieces."""
    all_pieces = [(piece, tensor) for table in tensors.values() for tensor in table.values() for piece in tensor.pieces]
    (place, uses), *_ = Counter((piece.file, piece.key) for piece, _ in all_pieces).most_common(1)
    _require(uses == 1, f"{place[1]!r:.200} of {place[0]} is used {uses} times")
    needed: Counter[str] = Counter()
    for piece, tensor in all_pieces:
        needed[piece.file] += prod(piece.shape(tensor.shape)) * DTYPES[tensor.dtype]
    for name, num_bytes in needed.items():
        _require(num_bytes <= files[name].size, f"{name} has {files[name].size} bytes, its tensors {num_bytes}")


def _table(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    _require(isinstance(manifest.get(name), dict), f"its {name} are not a table")
    return manifest[name]


def _entry(what: str, entry: Any, names: set[str]) -> dict[str, Any]:
    _require(isinstance(entry, dict) and set(entry) == names, f"{what} is not a table of {', '.join(sorted(names))}")
    return entry


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r:.200} is there twice")
    return table


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
