"""The text of a Python file with its syntax tree: expressions are replaced, and entries added to calls, dictionaries and imports, in place.

Positions are offsets in characters. Line ends of Windows are kept (`decoded`, `encoded`).
"""

import ast
import io
import math
import tokenize
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

from parallel.errors import Mistake

Node = ast.expr | ast.keyword | ast.alias | ast.stmt


def literal(value: Any) -> str:
    """An expression that evaluates to a value of a setting: a text in double quotes where it needs no escapes, a number, a tuple, …"""
    if isinstance(value, str):
        code = repr(value)
        plain = code[0] == "'" and '"' not in code and "\\" not in code
        return f'"{code[1:-1]}"' if plain else code
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} has no literal")
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    raise TypeError(f"a {type(value).__name__} has no literal here")


def decoded(raw: bytes, path: str) -> tuple[str, str, str]:
    """(text with plain line ends, encoding, line end) of a Python file. A Mistake if it mixes line ends."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
    text = raw.decode(encoding)
    plain = text.replace("\r\n", "\n")
    end = "\r\n" if "\r\n" in text else "\n"
    if "\r" in plain or plain.replace("\n", end) != text:
        raise Mistake(f"{path} mixes the line ends of several systems → save it with one kind")
    return plain, encoding, end


def encoded(text: str, encoding: str, end: str) -> bytes:
    """The inverse of `decoded`."""
    try:
        return text.replace("\n", end).encode(encoding)
    except UnicodeEncodeError:
        raise Mistake(f"config.py is in {encoding}, which lacks a character of a new value → save it as UTF-8") from None


class SourceText:
    """A Python file. Every method returns a new text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tree = ast.parse(text)
        self._lines = text.split("\n")
        self._starts = list(accumulate((len(line) + 1 for line in self._lines), initial=0))

    def start(self, node: Node) -> int:
        """Where the node begins."""
        return self._offset(node.lineno, node.col_offset)

    def end(self, node: Node) -> int:
        """Where the node has ended."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self._offset(node.end_lineno, node.end_col_offset)

    def number(self, wanted: ast.Call) -> int:
        """How many calls begin before this one, or contain it: the same in a text in which only an import has changed."""
        return sum((self.start(node), -self.end(node)) < (self.start(wanted), -self.end(wanted)) for node in self._calls)

    def replaced(self, node: ast.expr, code: str) -> str:
        """The text with other code in the place of an expression."""
        return self.text[: self.start(node)] + code + self.text[self.end(node) :]

    def with_entry(self, container: Node, entries: Sequence[Node], after: Node | None, entry: str) -> str:
        """The text with one more entry in a call, a dictionary or an import: behind the entry `after`, or behind the last.

        An entry that stands on a line of its own gets a neighbour on a line of its own; a comment stays with its line.
        """
        is_bracketed = self.text[self.end(container) - 1] in ")}"
        close = self.end(container) - is_bracketed
        if not entries:
            return self.text[:close] + entry + self.text[close:]
        after = after or entries[-1]
        begin = self.end(after)
        tokens = [(at, end, word) for at, end, word in self._tokens if begin <= at < close]
        comma = next((at for at, _, word in tokens if word == ","), None)  # nested commas lie inside of entries
        following = [later for later in entries if self.start(later) > begin]
        if comma is not None:
            behind = next((at for at, _, _ in tokens if at > comma), close)
            if not is_bracketed or "\n" not in self.text[comma:behind]:
                return f"{self.text[:comma]}, {entry}{self.text[comma:]}"
            place = self._line_end(comma)
            return f"{self.text[:place]}\n{self._indent(after, following)}{entry},{self.text[place:]}"
        end = max((end for _, end, _ in tokens), default=begin)  # parentheses around the last value
        if "\n" not in self.text[end:close]:
            return f"{self.text[:end]}, {entry}{self.text[end:]}"
        place = self._line_end(end)
        return f"{self.text[:end]},{self.text[end:place]}\n{self._indent(after, following)}{entry}{self.text[place:]}"

    def with_name(self, node: ast.ImportFrom, name: str) -> str:
        """The text in which the import has one more name, in the order that sorts constants before classes."""
        smaller = [alias for alias in node.names if (not alias.name.isupper(), alias.name) < (not name.isupper(), name)]
        if smaller:
            return self.with_entry(node, node.names, smaller[-1], name)
        first = self.start(node.names[0])
        return f"{self.text[:first]}{name}, {self.text[first:]}"

    @cached_property
    def _calls(self) -> list[ast.Call]:
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]

    @cached_property
    def _tokens(self) -> list[tuple[int, int, str]]:
        """(start, end, word) of every token but comments and line ends."""
        unseen = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
        tokens = tokenize.generate_tokens(io.StringIO(self.text, newline="\n").readline)
        return [(self._starts[token.start[0] - 1] + token.start[1], self._starts[token.end[0] - 1] + token.end[1], token.string)
                for token in tokens if token.type not in unseen]  # fmt: skip

    def _offset(self, line: int, column: int) -> int:
        """ast counts the bytes of UTF-8 in a line."""
        return self._starts[line - 1] + len(self._lines[line - 1].encode()[:column].decode())

    def _line_end(self, place: int) -> int:
        end = self.text.find("\n", place)
        return len(self.text) if end < 0 else end

    def _indent(self, after: Node, following: Sequence[Node]) -> str:
        """The white space in front of a new entry: that of its neighbours which begin a line."""
        for node in (after, *following):
            before = self.text[: self.start(node)].rpartition("\n")[2]
            if not before.strip():
                return before
        line = self._lines[after.lineno - 1]
        return line[: len(line) - len(line.lstrip())] + "    "
