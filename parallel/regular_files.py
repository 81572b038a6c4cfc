"""Reads files that may come from a stranger: regular files only, without blocking, at most so many bytes, and JSON of bounded size.

A name can be a pipe that nobody writes to, a device without an end, a sparse file of terabytes, or a link to a file of the reader's own.
Whoever reads a run folder, a checkpoint or a downloaded model reads it with these functions. Imports no torch.
"""

import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from parallel.errors import Mistake

LARGEST_JSON = 16 * 2**20
"""The most bytes of a JSON file, unless its reader says otherwise."""
MOST_VALUES = 2**20
"""The most values of a JSON file, unless its reader says otherwise: a value takes up to about 100 bytes of memory, however short it is."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DIGITS = 400
"""The most digits of a number in JSON. Python itself refuses whole numbers of more than 4,300."""
HUB_CACHE, HUB_BLOBS = "models--", "blobs"
"""In Hugging Face's cache, models--OWNER--NAME/snapshots/REVISION/FILE is a link to models--OWNER--NAME/blobs/HASH."""


def open_regular(path: Path) -> io.BufferedReader:
    """Opens a regular file, or a link to one, for reading. An OSError says what else it is.

    It is opened without blocking and looked at afterwards, so that a pipe cannot take the place of the file in between.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(0, f"it is {kind_of(mode)}, not a file", str(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def kind_of(mode: int) -> str:
    """What a mode of `stat` says a name is: 'a folder', 'a pipe', …"""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_regular(path: Path, at_most: int) -> bytes:
    """The content of a regular file of at most `at_most` bytes. Raises an OSError that says what is wrong."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(at_most + 1) if size <= at_most else b""
        if size > at_most or len(content) > at_most:
            raise OSError(0, f"it has {max(size, len(content)):,} bytes, more than {at_most:,}", str(path))
        return content


def parsed_json(raw: bytes, most_values: int = MOST_VALUES, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value that JSON in UTF-8 holds; `pairs` makes an object of its names and values. A ValueError says what is wrong with it.

    Values are counted before they are made: a file of 16 MB may hold eight million empty lists, which take a gigabyte. NaN, infinities
    and numbers of more than DIGITS digits are refused; json writes the former but no other program reads them.
    """
    values = sum(map(raw.count, (b",", b"[", b"{", b":")))
    if values > most_values:
        raise ValueError(f"it has up to {values:,} values, more than {most_values:,}")
    try:
        return json.loads(
            raw.removeprefix(BYTE_ORDER_MARK).decode("utf-8"),
            object_pairs_hook=pairs,
            parse_constant=_refused_constant,
            parse_int=_parsed_int,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refused_constant(value: str) -> float:
    raise ValueError(f"{value} is not JSON")


def _parsed_int(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"it has a number of {len(digits):,} digits")
    return int(digits)


def read_table(path: Path, way_out: str, at_most: int = LARGEST_JSON, most_values: int = MOST_VALUES) -> dict[str, Any]:
    """The object in a JSON file. Raises a Mistake, which ends in `way_out`, for anything else; an OSError if there is no such file."""
    try:
        content = read_regular(path, at_most)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror or error}) → {way_out}") from None
    return table_of(content, path, way_out, most_values)


def table_of(content: bytes, path: Path, way_out: str, most_values: int = MOST_VALUES) -> dict[str, Any]:
    """The object in the JSON that a file holds. Raises a Mistake, which ends in `way_out`, for anything else."""
    try:
        table = parsed_json(content, most_values)
    except ValueError as error:
        raise Mistake(f"{path} is not JSON ({str(error)[:120]}) → {way_out}") from None
    if not isinstance(table, dict):
        raise Mistake(f"{path} holds no JSON object but a {type(table).__name__} → {way_out}")
    return table


def read_lines_bounded(file: IO[bytes], longest: int) -> Iterator[bytes]:
    """The lines of an open file without their ends. A line of more than `longest` bytes is left out, and is never held in memory."""
    while line := file.readline(longest + 1):
        if len(line) <= longest or line.endswith(b"\n"):
            yield line.removesuffix(b"\n")
            continue
        while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
            pass


def check_inside(path: Path, folder: Path) -> Path:
    """The path with its links resolved. A Mistake if it is no regular file, or a link that leads out of the folder that was named.

    In a snapshot of Hugging Face's cache, links may also lead to the blobs of the same model.
    """
    try:
        target, home = path.resolve(strict=True), folder.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links is a RuntimeError, a null byte in a name a ValueError
        raise Mistake(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}) → fetch the folder again") from None
    if not stat.S_ISREG(mode):
        raise Mistake(f"{path} is {kind_of(mode)}, not a file → fetch the folder again")
    allowed = [home, *(cache / HUB_BLOBS for cache in home.parents if cache.name.startswith(HUB_CACHE))]
    if not any(target.is_relative_to(place) for place in allowed):
        raise Mistake(f"{path} is a link that leads out of its folder, to {target} → copy the file into the folder if you want it read")
    return target
