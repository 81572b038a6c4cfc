"""Files of text as users have them: plain text, JSON lines and Parquet, each also compressed, and folders of them. Read in bounded memory.

    .jsonl             one JSON object a line and a document, its text under a key
    .parquet           one row a document, its text in a column
    any other name     plain text, one document: .txt, .md, source code
    + .gz .xz .zst     the same, compressed (but for .parquet, which compresses by itself)

In a folder, the files are taken in the order of their paths. What is hidden, or is not text, is left out and counted.
"""

import contextlib
import gzip
import importlib
import importlib.util
import io
import json
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from parallel.errors import Mistake, listed, listed_up_to
from parallel.regular_files import kind_of, open_regular
from parallel.text import REPLACEMENT, UTF16_MARKS, decoded_blocks, decoded_line, json_value, refuse_half_characters

LINES, PARQUET = ".jsonl", ".parquet"
PLAIN = (".txt", ".md")
"""Names of plain text. Of a file of any other name, the beginning decides whether it is read."""
COMPRESSED = (".gz", ".xz", ".zst")
KINDS = (*PLAIN, LINES, PARQUET)
BLOCK = 1 << 20
"""Bytes that are read and decoded at a time."""
LONGEST_LINE = 1 << 24
"""The most bytes of a line of JSON, which is held in memory as a whole. Plain text has no such limit."""
ROWS = 16
"""Rows of a Parquet file that are read at a time."""
SNIFFED = 1 << 13
"""Bytes from the beginning of a file that decide whether it is text."""
HALF = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair, which JSON can spell."""
MOST_NAMES = 8
INSTALL = "pip install -r requirements-data.txt"
EXAMPLE = '{"text": "one document"}'
Advance = Callable[[int], object]
Item = TypeVar("Item")


class Fragment(NamedTuple):
    """A part of a document, and whether it is the last one. A document without text is one empty fragment."""

    text: str
    is_last: bool


@dataclass(frozen=True)
class Reading:
    """How files are read: the key or column of the text, and whether what is not UTF-8 is replaced by U+FFFD or is a Mistake."""

    key: str = "text"
    replace: bool = False


@dataclass
class LeftOut:
    """Counts the files of folders that are left out, by reason, and the sequences of bytes that were replaced by U+FFFD."""

    files: dict[str, int] = field(default_factory=dict)
    replaced: int = 0

    def leave_out(self, reason: str, number: int = 1) -> None:
        """Counts files."""
        self.files[reason] = self.files.get(reason, 0) + number

    def sentence(self) -> str:
        """'12 files are left out (9 not text, 3 hidden)'; empty if none is."""
        counts = ", ".join(f"{number:,} {reason}" for reason, number in sorted(self.files.items()))
        total = sum(self.files.values())
        return f"{total:,} {'file is' if total == 1 else 'files are'} left out ({counts})" if total else ""


@dataclass(frozen=True)
class TextFile:
    """One file: where it is, and what its name says of its content."""

    path: Path
    name: str
    """What messages and records call it: the path as it was given."""

    @property
    def compression(self) -> str:
        """'.gz', '.xz', '.zst' or ''."""
        return next((end for end in COMPRESSED if self.path.name.lower().endswith(end)), "")

    @property
    def kind(self) -> str:
        """One of KINDS; '' for a file of any other name, which is plain text if its beginning is."""
        name = self.path.name.lower().removesuffix(self.compression)
        return next((kind for kind in KINDS if name.endswith(kind)), "")

    def fragments(self, reading: Reading, left: LeftOut, advance: Advance = lambda n: None) -> Iterator[Fragment]:
        """The documents in parts, in memory for one part, a line of JSON, or ROWS rows. `advance` is told of bytes of the file read.

        Whatever cannot be read is a Mistake that names file and line.
        """
        with self.readable(), open_regular(self.path) as raw:
            size = os.fstat(raw.fileno()).st_size
            found = self._rows(raw, size, reading, left) if self.kind == PARQUET else self._texts(raw, reading, left)
            yield from _advancing(found, size, advance)

    def lines(self, reading: Reading, left: LeftOut, advance: Advance = lambda n: None) -> Iterator[tuple[str, str]]:
        """(place, line) of each line of JSON that is not blank; the place is 'FILE, line 3'. Otherwise as `fragments`."""
        return ((place, line) for place, line in self.all_lines(reading, left, advance) if line.strip())

    def all_lines(self, reading: Reading, left: LeftOut, advance: Advance = lambda n: None) -> Iterator[tuple[str, str]]:
        """(place, line) of each line, without its line end."""
        with self.readable(), open_regular(self.path) as raw, _decompressed(raw, self.compression) as file:
            found = ((line, raw.tell()) for line in _placed_lines(file, str(self.path), reading, left))
            yield from _advancing(found, os.fstat(raw.fileno()).st_size, advance)

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        """Turns the errors of the file system and of decompressors into a Mistake that names the file."""
        try:
            yield
        except Mistake:
            raise
        except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
            raise self._broken(error) from error
        except OSError as error:
            if self.kind == PARQUET and error.errno is None:  # pyarrow's, of what the file holds
                raise self._broken(error) from error
            raise Mistake(f"{self.path} cannot be read ({error.strerror or error}) → check the file and its permissions") from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("backports", "compression", "pyarrow"):
                raise self._broken(error) from error
            raise

    def _broken(self, error: Exception) -> Mistake:
        way_out = "write it again" if self.kind == PARQUET else "compress it again"
        return Mistake(f"{self.path} is not a whole {self.kind}{self.compression} file ({' '.join(str(error).split())[:120]}) → {way_out}")

    def _texts(self, raw: io.BufferedReader, reading: Reading, left: LeftOut) -> Iterator[tuple[Fragment, int]]:
        """The documents in parts, each with the bytes of the file that are read."""
        with _decompressed(raw, self.compression) as file:
            for fragment in (_lines if self.kind == LINES else _plain)(file, str(self.path), reading, left):
                yield fragment, raw.tell()

    def _rows(self, raw: io.BufferedReader, size: int, reading: Reading, left: LeftOut) -> Iterator[tuple[Fragment, int]]:
        """One document for each row of the column `reading.key`, each with the bytes of the file that are read, as far as rows tell."""
        if importlib.util.find_spec("pyarrow") is None:
            raise Mistake(f"{self.path}: .parquet needs pyarrow → {INSTALL}")
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        file = parquet.ParquetFile(raw, pre_buffer=False, buffer_size=BLOCK)
        schema = file.schema_arrow
        if reading.key not in schema.names:
            raise _no_key(str(self.path), reading.key, schema.names, "column")
        if schema.names.count(reading.key) > 1:
            raise Mistake(f"{self.path} has {schema.names.count(reading.key)} columns {reading.key!r} → write it again with one")
        kind = schema.field(reading.key).type
        if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
            raise Mistake(f"{self.path}: the column {reading.key!r} holds {kind}, not text → name another one: --key")
        row = 0
        for batch in file.iter_batches(batch_size=ROWS, columns=[reading.key], use_threads=False):
            for value in batch.column(0).cast(arrow.large_binary()):
                row += 1
                text = _valid(value.as_py() or b"", f"{self.path}, row {row}", reading, left)
                yield Fragment(text, True), size * row // file.metadata.num_rows


def _advancing(found: Iterator[tuple[Item, int]], size: int, advance: Advance) -> Iterator[Item]:
    """What is found in a file of `size` bytes, each with the bytes of the file that are read; `advance` is told of these."""
    told = 0
    for item, at in found:
        yield item
        advance(at - told)
        told = at
    advance(size - told)


def _valid(raw: bytes, place: str, reading: Reading, left: LeftOut) -> str:
    """The text of a row. Parquet's writers do not check that what they write is UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if not reading.replace:
            raise Mistake(f"{place} is not UTF-8 (byte {error.start}: {error.reason}) → write it again as UTF-8") from None
    text = raw.decode("utf-8", "replace")
    left.replaced += text.count(REPLACEMENT) - raw.count(REPLACEMENT.encode())
    return text


def _plain(file: Any, where: str, reading: Reading, left: LeftOut) -> Iterator[Fragment]:
    """The one document of a file of plain text."""
    held = ""
    for text, replaced in decoded_blocks(iter(lambda: file.read(BLOCK), b""), where, reading.replace):
        left.replaced += replaced
        if held and text:
            yield Fragment(held, False)
        held = text or held
    yield Fragment(held, True)


def _lines(file: Any, where: str, reading: Reading, left: LeftOut) -> Iterator[Fragment]:
    """One document for each line that is not blank."""
    for place, line in _placed_lines(file, where, reading, left):
        if line.strip():
            yield Fragment(text_of(line_value(line, place, reading), place, reading, left), True)


def _placed_lines(file: Any, where: str, reading: Reading, left: LeftOut) -> Iterator[tuple[str, str]]:
    """(place, line) of each line."""
    number = 0
    while raw := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(raw) > LONGEST_LINE:
            most = f"more than {LONGEST_LINE / 2**20:.0f} MiB"
            raise Mistake(f"{where}, line {number} has {most}, and a line of JSON is read whole → write this document as a .txt file")
        if reading.replace and not raw.startswith(UTF16_MARKS):
            raw = _valid(raw, where, reading, left).encode()
        yield decoded_line(raw, number, where)


def line_value(line: str, place: str, reading: Reading) -> Any:
    """What one JSON line holds."""
    return json_value(line, place, f"one object such as {json.dumps({reading.key: 'one document'})} a line")


def text_of(value: Any, place: str, reading: Reading, left: LeftOut) -> str:
    """The text in what a JSON line holds; empty for null."""
    key, example = reading.key, json.dumps({reading.key: "one document"})
    if not isinstance(value, dict):
        raise Mistake(f"{place} has no {json.dumps(key)} → write one object such as {example} a line")
    if key not in value:
        raise _no_key(place, key, list(value), "key")
    text = value[key]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise Mistake(f"{place} has no {json.dumps(key)} that is text → write one object such as {example} a line")
    return without_halves(text, place, reading, left)


def without_halves(text: str, place: str, reading: Reading, left: LeftOut) -> str:
    """A text of a JSON line, in which half a surrogate pair is replaced by U+FFFD and counted, or is a Mistake."""
    if reading.replace:
        text, halves = HALF.subn(REPLACEMENT, text)
        left.replaced += halves
        return text
    refuse_half_characters(text, place)
    return text


def _no_key(place: str, key: str, names: list[str], what: str) -> Mistake:
    """The Mistake for a line or file that lacks the key; with `data.train` there is no --key, and the text has to be under "text"."""
    there = f"its {what}s are {listed_up_to((repr(name)[:40] for name in names), MOST_NAMES)}" if names else f"it has no {what}"
    example = f"one object such as {json.dumps({key: 'one document'})} a line"
    pairs = ' (of pairs "source" and "target": prepare --pairs)' if what == "key" else ""
    way_out = f"name the {what} of the text: prepare --key NAME, or write {example}{pairs}"
    return Mistake(f"{place} has no {json.dumps(key)}: {there} → {way_out}")


@contextlib.contextmanager
def _decompressed(raw: io.BufferedReader, compression: str) -> Iterator[Any]:
    """The file as it was before it was compressed."""
    if compression == ".gz":
        with gzip.open(raw, "rb") as file:
            yield file
    elif compression == ".xz":
        with lzma.open(raw, "rb") as file:
            yield file
    elif compression == ".zst":
        with _zstd().open(raw, "rb") as file:
            yield file
    else:
        yield raw


def _zstd() -> Any:
    """The module that reads .zst: Python's own from 3.14 on, and its backport before."""
    for name in ("compression.zstd", "backports.zstd"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise Mistake(f".zst needs backports.zstd → {INSTALL}")


def find(path: Path, name: str, left: LeftOut) -> list[TextFile]:
    """The file, or the files of text in the folder and its subfolders, in the order of their paths. Reads beginnings only.

    A Mistake if a file that is named itself is missing, empty, or not text.
    """
    if path.is_dir():
        return _in_folder(path, name, left)
    try:
        status = path.stat()
    except OSError as error:
        raise Mistake(f"{path} {_missing(error)} → check the path") from None
    if not stat.S_ISREG(status.st_mode):
        raise Mistake(f"{path} is {kind_of(status.st_mode)}, not a file → name a {listed(KINDS)} file, or a folder of them")
    if not status.st_size:
        raise Mistake(f"{path} is empty → write some text into it, or leave it out")
    file = TextFile(path, name)
    if _is_binary(file):
        raise Mistake(f"{path} is not text, its beginning is binary → name a {listed(KINDS)} file, or a folder of them")
    return [file]


def _missing(error: OSError) -> str:
    return "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"


def _in_folder(folder: Path, name: str, left: LeftOut) -> list[TextFile]:
    """The folder's files of text, sorted by path, part by part."""
    found: list[tuple[tuple[str, ...], TextFile]] = []

    def refuse(error: OSError) -> None:
        raise Mistake(f"{error.filename} cannot be read ({error.strerror}) → check the folder and its permissions") from error

    for place, folders, names in os.walk(folder, onerror=refuse):
        for entry in [entry for entry in folders if entry.startswith(".") or (Path(place) / entry).is_symlink()]:
            left.leave_out("hidden" if entry.startswith(".") else "links")
            folders.remove(entry)
        for entry in names:
            path = Path(place) / entry
            parts = path.relative_to(folder).parts
            file = TextFile(path, "/".join((name.rstrip("/"), *parts)))
            if reason := _why_left_out(file):
                left.leave_out(reason)
            else:
                found.append((parts, file))
    return [file for _, file in sorted(found, key=lambda entry: entry[0])]


def _why_left_out(file: TextFile) -> str:
    """Why a file of a folder is not read; empty if it is."""
    if file.path.name.startswith("."):
        return "hidden"
    if file.path.is_symlink():
        return "links"
    if not file.path.is_file():
        return "not a file"
    if not file.path.stat().st_size:
        return "empty"
    return "not text" if _is_binary(file) else ""


def _is_binary(file: TextFile) -> bool:
    """Whether the beginning of a file, decompressed, has a zero byte, which is git's sign of a binary file, as UTF-16 without a mark does.

    A file whose name does not say what it is must be UTF-8, too. JSON lines and Parquet are found to be damaged when they are read.
    """
    if file.kind in (LINES, PARQUET):
        return False
    with file.readable(), open_regular(file.path) as raw, _decompressed(raw, file.compression) as opened:
        beginning = opened.read(SNIFFED)
    if beginning.startswith(UTF16_MARKS) and file.kind:
        return False  # the reader says that it is UTF-16
    try:
        next(decoded_blocks([beginning], "", replace=bool(file.kind)))
    except Mistake:
        return True
    return b"\0" in beginning
