"""Writes and reads metrics.jsonl, the source of truth of a run: one JSON object per line, each flushed when it is written.

Every line is strict JSON, so any tool can read it. JSON has no NaN and no infinity: such a value is written as null and named in
`"non_finite": {"train/loss": "nan"}` ("nan", "inf" or "-inf"); `read` restores the float.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from parallel.errors import Mistake
from parallel.regular_files import open_regular, read_lines_bounded

NON_FINITE = "non_finite"
LONGEST_ROW, LARGEST, LAST = 2**20, 2**30, 2**26
"""The most bytes of a row, of a file that is read as a whole, and of the end of a file in which the newest values are looked for."""
MOST_DIGITS = 18
"""Of a whole number; one with more is read as a float."""
BLOCK = 2**18
"""Bytes that are read at a time from the end of a file."""


class JsonLines:
    """A file of JSON objects to append to. A line cut short by a kill is ended first, so that the next row has a line of its own.

    A row is written whole or not at all: what a full disk took of it is cut off again. The row is kept, and is written before the next.
    """

    def __init__(self, path: Path):
        self._path, self._waiting = path, list[str]()
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            self._append(b"\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row and gives it to the operating system, so that a killed process loses no row that it logged.

        An OSError that names the file if the disk refuses.
        """
        self._waiting.append(encode(row) + "\n")
        self.write_waiting()

    @property
    def waiting(self) -> list[str]:
        """The lines that the disk has refused so far."""
        return [line.rstrip("\n") for line in self._waiting]

    def write_missing(self, lines: Iterable[str]) -> None:
        """Appends those of the lines, each a row as `encode` gives it, that the file does not have."""
        if not (lines := list(lines)):
            return
        there = set(self._path.read_text(encoding="utf-8", errors="replace").split("\n"))
        self._waiting += [f"{line}\n" for line in lines if line not in there and decode(line) is not None]
        self.write_waiting()

    def close(self) -> None:
        """Writes what a full disk has refused before, if it can be written now, and closes the file."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                self.write_waiting()
            os.close(self._file)
            self._file = -1

    def write_waiting(self) -> None:
        """Writes the rows that the disk has refused so far. An OSError that names the file if it still refuses."""
        while self._waiting:
            self._append(self._waiting[0].encode("utf-8", "backslashreplace"))  # a lone surrogate stays valid JSON
            del self._waiting[0]

    def _append(self, line: bytes) -> None:
        before = os.fstat(self._file).st_size
        try:
            left = memoryview(line)
            while left:  # a disk that fills up accepts a part before it refuses the rest
                left = left[os.write(self._file, left) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, before)
            raise OSError(error.errno, error.strerror, str(self._path)) from error


def encode(row: Mapping[str, Any]) -> str:
    """One row as one line of strict JSON."""
    row = plain(row)
    non_finite = {key: repr(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    safe = {key: None if key in non_finite else value for key, value in row.items()}
    return json.dumps(safe | ({NON_FINITE: non_finite} if non_finite else {}), allow_nan=False, ensure_ascii=False)


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with numpy and torch scalars as Python numbers."""
    return {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}


def decode(line: str | bytes) -> dict[str, Any] | None:
    """The row of one line; None for a line that no run writes, such as one cut short by a kill."""
    try:
        row = json.loads(line if isinstance(line, str) else line.decode("utf-8", errors="replace"), parse_int=_whole_number)
        return row | {key: float(text) for key, text in row.pop(NON_FINITE, {}).items()}
    except (ValueError, RecursionError, TypeError, AttributeError):
        return None


def _whole_number(digits: str) -> float:
    """An int, or a float if it has more digits than any counter: JSON allows any number of them, and arithmetic with floats overflows."""
    return int(digits) if len(digits) <= MOST_DIGITS else float(digits)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, oldest first; none if there is no file. A row is parsed when it is asked for, and no other line is kept.

    A Mistake if it is no regular file, or larger than LARGEST.
    """
    if not path.exists():
        return
    with _opened(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > LARGEST:
            raise Mistake(f"{path} has {size:,} bytes, more than {LARGEST:,} → take out rows that you do not need")
        for line in read_lines_bounded(file, LONGEST_ROW):
            if (row := decode(line)) is not None:
                yield row


def last(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """For each key, its value in the newest row that has it, in the last LAST bytes. Rows are parsed from the end, until all are found."""
    values: dict[str, Any] = {}
    wanted = set(keys)
    if not path.exists():
        return values
    with _opened(path) as file:
        for row in filter(None, map(decode, _lines_from_end(file))):
            values |= {key: row[key] for key in wanted - values.keys() if key in row}
            if len(values) == len(wanted):
                break
    return values


def _opened(path: Path) -> IO[bytes]:
    try:
        return open_regular(path)
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror}) → restore it, or name another folder") from None


def _lines_from_end(file: IO[bytes]) -> Iterator[bytes]:
    """The lines in the last LAST bytes of a file, the last one first. What is left of a line that is too long is no JSON."""
    place = file.seek(0, os.SEEK_END)
    first, begun = max(0, place - LAST), b""
    while place > first:
        size = min(BLOCK, place - first)
        place = file.seek(place - size)
        begun, *whole = (file.read(size) + begun).split(b"\n")
        yield from reversed(whole)
        begun = begun if len(begun) <= LONGEST_ROW else b"\xff"
    yield begun


def finite(value: Any) -> Any:
    """The same lists and dicts with "nan", "inf" and "-inf" for the floats that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def perplexity(loss: float) -> float:
    """e^loss; infinite if that overflows, nan if the loss is nan."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def relative(a: float, b: float) -> float:
    """The relative error |a − b|/|b|; infinite if a is not a number."""
    error = abs(a - b) / abs(b)
    return error if error == error else math.inf
