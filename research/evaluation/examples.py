"""Files that tasks are read from: rows of .jsonl with the fields they need, plain text, and what to say where one is missing."""
# MERGED-DOC """A context and what may follow it, as tokens: cut apart where lm-evaluation-harness cuts them, so that the figures are comparable."""
# MERGED-DOC """A task on one file of the user's: the part that all of them share."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from research.data.tokenizer import Tokenizer
from research.evaluation.scorer import ScoreRequest
from research.evaluation.task import Settings, TaskContext


def continuation(tokenizer: Tokenizer, context: str, following: str, length: int, where: str = "a text") -> ScoreRequest:
    """`following`, to be scored after `context`; of a context that is too long its end. After end-of-text where the context is empty.

    White space at the context's end belongs to what follows. Both are tokenized as one text, and the cut is after as many tokens
    as the context has alone. A Mistake where nothing is left to score or it does not fit.
    """
    before, after = context_and_continuation(tokenizer, context, following)
    if not after:
        raise Mistake(f"{where}: {following!r} adds no token to its context → give it text of its own")
    if len(after) >= length:
        raise Mistake(f"{where}: {len(after)} tokens are to be scored, the model takes {length - 1} → shorten the text")
    return ScoreRequest(tuple((before + after)[-length:]), len(after))


def context_and_continuation(tokenizer: Tokenizer, context: str, following: str) -> tuple[list[int], list[int]]:
    """The context's tokens and those that follow it."""
    if not context:
        ids = tokenizer.encode(following)
        own = ids[:1] == [tokenizer.end_of_text]
        return ([tokenizer.end_of_text], ids[1:] if own else ids)
    stripped = context.rstrip()
    whole, alone = tokenizer.encode(context + following), tokenizer.encode(stripped)
    return whole[: len(alone)], whole[len(alone) :]


KINDS = {str: "a text", int: "a whole number", list: "a list"}


@dataclass(frozen=True)
class Row:
    """One line's object, and where it stands."""

    where: str
    fields: dict[str, Any]

    def refuse(self, what: str, example: str) -> Mistake:
        """To be raised: what is wrong with the line, and how one looks that is right."""
        return Mistake(f"{self.where} {what} → write lines such as {example}")


def exists(path: Path, spec: str, suffixes: tuple[str, ...]) -> Path:
    """The path, where a file of this kind is there; a Mistake naming what was asked for otherwise."""
    if path.suffix not in suffixes:
        raise Mistake(f"{spec}: {path.name} is not a kind of file that this task reads → use {' or '.join(suffixes)}")
    if not path.is_file():
        raise Mistake(f"{spec}: {path} {'is a folder' if path.is_dir() else 'does not exist'} → name a {' or '.join(suffixes)} file")
    return path


def read_text(path: Path) -> str:
    """A whole UTF-8 file, its line ends as they are."""
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Mistake(f"{path} cannot be read ({error}) → check the file; texts are UTF-8") from error


def rows(path: Path, needs: Mapping[str, type], example: str) -> Iterator[Row]:
    """The objects of a .jsonl file, blank lines skipped; each has the fields named, of these types."""
    found = 0
    for number, line in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), start=1):
        if line.strip():
            found += 1
            yield _row(line, f"{path}, line {number}", needs, example)
    if not found:
        raise Mistake(f"{path} has no examples → write lines such as {example}")


def _row(line: str, where: str, needs: Mapping[str, type], example: str) -> Row:
    try:
        row = Row(where, json.loads(line))
    except (ValueError, RecursionError) as error:
        raise Mistake(f"{where} is not JSON ({error}) → write lines such as {example}") from error
    if not isinstance(row.fields, dict):
        raise row.refuse("is not an object", example)
    for name, kind in needs.items():
        if not isinstance(row.fields.get(name), kind) or isinstance(row.fields[name], bool):
            raise row.refuse(f'has no "{name}" that is {KINDS[kind]}', example)
    return row


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror}) → check the file and its permissions") from error


@dataclass(frozen=True)
class FileTask:
    """All of research/evaluation/task.py's Task but `exam`."""

    name: str
    chosen: Settings
    path: Path

    @property
    def settings(self) -> dict[str, Any]:
        """How many examples."""
        return {"limit": self.chosen.limit}

    def digest(self, given: TaskContext) -> str:
        """Of the file."""
        return file_digest(self.path)
