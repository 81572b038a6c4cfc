"""Reads the text that users hand over (UTF-8, byte-order marks, line ends, JSON lines), and makes any text safe for a terminal.

Every reader of a corpus, a file of prompts, a task or a chat template is built on these functions, so that a mark is never part of
a text and an error names file and line. Whatever leaves for a terminal goes through `printable`. Imports no torch.
"""

import codecs
import json
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from parallel.regular_files import BYTE_ORDER_MARK

UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
REPLACEMENT = "\ufffd"
"""The character that stands for bytes that are no UTF-8."""
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control characters, of marks without a shape (direction, zero width), of surrogates, and of line ends."""
LONGEST_SHOWN = 4000
"""The most characters of one text that a terminal is shown, unless its writer says otherwise."""


def read_text(path: Path, name: str = "", way_out: str = "check the file and its permissions") -> str:
    """The content of a file with its line ends unchanged. A Mistake calls it `name`, if that is given, and ends in `way_out`."""
    return decoded(_read(path, name, way_out), name or str(path))


def read_lines(path: Path, name: str = "", way_out: str = "check the file and its permissions") -> Iterator[tuple[str, str]]:
    """`lines` of a whole file."""
    return lines(_read(path, name, way_out).split(b"\n"), name or str(path))


def _read(path: Path, name: str, way_out: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Mistake(f"{name or path} cannot be read ({error.strerror or error}) → {way_out}") from error


def decoded(raw: bytes, where: str) -> str:
    """A whole text, its line ends unchanged. A Mistake names the line that is not UTF-8."""
    raw = raw.removeprefix(BYTE_ORDER_MARK)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].split(b"\n")
        raise _not_utf8(raw, f"{where}, line {len(before)}", len(before[-1]), error.reason) from None


def decoded_blocks(blocks: Iterable[bytes], where: str, replace: bool = False) -> Iterator[tuple[str, int]]:
    """(text, sequences replaced in it) of each block of a whole text, in memory for one block. A character may lie in two blocks.

    The first block has at least three bytes, unless the text is shorter. `replace`: each sequence of bytes that is not UTF-8 becomes one
    U+FFFD and is counted. Otherwise it is a Mistake that names line and byte as `decoded` does.
    """
    rest, line, column = b"", 1, 0
    for number, block in enumerate(chain(blocks, [None])):
        raw = rest + (block or b"")
        if number == 0 and raw.startswith(UTF16_MARKS):
            raise _not_utf8(raw, f"{where}, line 1", 0, "")
        raw = raw.removeprefix(BYTE_ORDER_MARK) if number == 0 else raw
        try:
            text, used = codecs.utf_8_decode(raw, "replace" if replace else "strict", block is None)
        except UnicodeDecodeError as error:
            last = raw.rfind(b"\n", 0, error.start)
            byte = column + error.start if last < 0 else error.start - last - 1
            bad = line + raw.count(b"\n", 0, error.start)
            raise _not_utf8(b"", f"{where}, line {bad}", byte, error.reason) from None
        yield text, text.count(REPLACEMENT) - raw.count(REPLACEMENT.encode(), 0, used)
        last = raw.rfind(b"\n", 0, used)
        line, column, rest = line + raw.count(b"\n", 0, used), column + used if last < 0 else used - last - 1, raw[used:]


def lines(raw_lines: Iterable[bytes], where: str) -> Iterator[tuple[str, str]]:
    """(place, line) of each line of a file that is open in binary mode; the place is '`where`, line 3'. Lines have no line end."""
    return (decoded_line(raw, number, where) for number, raw in enumerate(raw_lines, start=1))


def decoded_line(raw: bytes, number: int, where: str) -> tuple[str, str]:
    """(place, line) of line `number`, counted from 1."""
    place = f"{where}, line {number}"
    raw = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
    try:
        return place, raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise _not_utf8(raw, place, error.start, error.reason) from None


def json_value(line: str, place: str, example: str) -> Any:
    """The value on a line of JSON; `example` is what a Mistake says that one should write."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # a ValueError also for a whole number of more than 4,300 digits
        raise Mistake(f"{place} is not JSON ({error}) → write {example}") from error


def refuse_half_characters(text: str, place: str) -> None:
    """A Mistake if JSON has spelled half a surrogate pair, which no UTF-8 text holds and no tokenizer can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Mistake(f"{place} has half a surrogate pair at character {error.start} → write the whole character") from error


def _not_utf8(raw: bytes, place: str, byte: int, reason: str) -> Mistake:
    if raw.startswith(UTF16_MARKS):
        return Mistake(f"{place.rpartition(', line ')[0]} is UTF-16 → save it as UTF-8")
    return Mistake(f"{place} is not UTF-8 (byte {byte}: {reason}) → save it as UTF-8")


def printable(text: str, most: int | None = LONGEST_SHOWN, tail: int = 0) -> str:
    """The text as a terminal may show it: newlines and tabs as they are, every character that has no shape as its escape (`\\x1b`).

    These are control characters (with them a text moves the cursor, changes a title or fills the clipboard), marks of direction and of
    zero width (with them it looks like another text), and other line ends than a newline. A text of more than `most` characters is cut
    before its last `tail`, and says how many are left out; None: it is not cut.
    """
    if most is not None and len(text) > most:
        head, end = text[: most - tail], text[len(text) - tail :]
        return f"{printable(head, None)}… ({len(text) - most:,} characters left out){' …' if tail else ''}{printable(end, None)}"
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(letter) if is_unseen(letter) else letter for letter in text)


def is_unseen(letter: str) -> bool:
    """Whether a character has no shape of its own; newlines and tabs, which only place the text after them, are not counted."""
    return letter not in "\n\t" and unicodedata.category(letter) in UNSEEN


def _escaped(letter: str) -> str:
    """A character as Python writes it in ASCII: \\x1b, \\u202e."""
    return ascii(letter)[1:-1]
