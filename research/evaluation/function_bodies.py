"""One-line function bodies for a model to fill in: those of a file, or of the packages of Python's library that code_stdlib holds out."""

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import Mistake
from research.data import python_stdlib
from research.evaluation.examples import Row
from research.evaluation.infilling import Infilling
from research.evaluation.task import TaskContext

HELD_OUT = ("val", "test")


@dataclass(frozen=True)
class FunctionBodies(Infilling):
    """What Infilling does, with one-line bodies as its examples. `path`: a .py file, or the folder of Python's library."""

    def digest(self, context: TaskContext) -> str:
        """SHA-256 of the examples, in hexadecimal: another version of Python has others."""
        lines = "".join(json.dumps(row.fields) + "\n" for row in self.rows())
        return hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()

    def rows(self) -> Iterator[Row]:
        """The bodies of one file after the other. A Mistake if there are none, or if the file is no Python code."""
        held_out = self.path.is_dir()
        paths = [path for split in HELD_OUT for path in python_stdlib.files(split)] if held_out else [self.path]
        found = False
        for path in paths:
            for line, fields in bodies(path):
                found = True
                yield Row(f"{path.name}:{line}", fields)
        if not found:
            raise Mistake(f"{self.path} has no function whose body is one line → name another file of Python code")


def bodies(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of the line, prefix, suffix and middle) of each one-line body in a file, in order of their lines.

    A one-line body is the only statement of a function beside its docstring, on a line of its own. The middle is the newline in front of
    it, its indentation and the statement: tokenizers begin a token there in any case, so a model that continues the prefix alone is not
    at a disadvantage. The suffix begins with what follows the statement on its line, mostly the newline.
    """
    try:
        text = path.read_bytes().decode()
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise Mistake(f"{path} cannot be read as Python code ({type(error).__name__}: {error!s:.80}) → name another file") from None
    lines = re.split("(?<=\n)", text)
    for statement in _only_statements(tree):
        if statement.lineno != statement.end_lineno:
            continue
        line, number = lines[statement.lineno - 1].encode(), statement.lineno  # ast's columns count bytes of UTF-8
        start, stop = statement.col_offset, statement.end_col_offset
        indentation, body, after = line[:start].decode(), line[start:stop].decode(), line[stop:].decode()
        if not indentation.strip():
            above = "".join(lines[: number - 1])
            prefix = above.removesuffix("\n").removesuffix("\r")
            middle = above[len(prefix) :] + indentation + body
            yield number, {"prefix": prefix, "suffix": after + "".join(lines[number:]), "middle": middle}


def _only_statements(tree: ast.Module) -> list[ast.stmt]:
    """The statement of each function that has one beside its docstring."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    without = [node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body for node in functions]
    return sorted((body[0] for body in without if len(body) == 1), key=lambda statement: statement.lineno)
