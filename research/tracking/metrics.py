"""metrics.jsonl, the source of truth of a run: one JSON object a line, flushed line by line.

Every line is strict JSON, so any tool reads it. JSON has no NaN and no infinity: such a value is written as null and named in
`"non_finite": {"train/loss": "nan"}` ("nan", "inf" or "-inf"); `read` puts the float back.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

NON_FINITE = "non_finite"


class JsonLines:
    """A file of JSON objects to append to. A line torn by a kill is closed first, so that the next row has a line of its own."""

    def __init__(self, path: Path):
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")  # a lone surrogate stays valid JSON
        if torn:
            self._file.write("\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row and flush it to the operating system: a killed process loses nothing it logged."""
        self._file.write(encode(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; writing afterwards is an error."""
        self._file.close()


def relative(a: float, b: float) -> float:
    """|a − b|/|b|; infinite where a is not a number."""
    error = abs(a - b) / abs(b)
    return error if error == error else math.inf


def finite(value: Any) -> Any:
    """The same lists and dicts with "nan", "inf" and "-inf" for what JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def perplexity(loss: float) -> float:
    """e^loss; infinite where that overflows, nan where the loss is."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with numpy and torch scalars as Python numbers."""
    return {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}


def encode(row: Mapping[str, Any]) -> str:
    """One row as one line of strict JSON."""
    row = plain(row)
    wild = {key: repr(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    safe = {key: None if key in wild else value for key, value in row.items()}
    return json.dumps(safe | ({NON_FINITE: wild} if wild else {}), allow_nan=False, ensure_ascii=False)


def decode(line: str) -> dict[str, Any] | None:
    """The row of one line; None for a line that is not a JSON object (torn by a kill)."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    return row | {key: float(text) for key, text in row.pop(NON_FINITE, {}).items()}


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, oldest first; none where there is no file."""
    return _decoded(_lines(path))


def read_backwards(path: Path) -> Iterator[dict[str, Any]]:
    """The rows, newest first: the last values of a long run without parsing all of it."""
    return _decoded(reversed(_lines(path)))


def last(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """For each key, its value in the newest row that has it."""
    found: dict[str, Any] = {}
    wanted = set(keys)
    for row in read_backwards(path):
        found |= {key: row[key] for key in wanted - found.keys() if key in row}
        if len(found) == len(wanted):
            break
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []


def _decoded(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    return (row for line in lines if (row := decode(line)) is not None)
