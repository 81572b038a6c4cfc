"""Tasks on a file: reads .jsonl examples and plain text, and splits a context and its continuation into tokens.

Contexts and continuations are split where lm-evaluation-harness splits them, so that the metrics are comparable.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from parallel.errors import Mistake
from parallel.files import sha256_of
from parallel.text import json_value, read_lines, refuse_half_characters
from research.data.tokenizer import Tokenizer
from research.evaluation import statistics
from research.evaluation.scorer import ScoreRequest
from research.evaluation.task import Metric, Settings, TaskContext

TYPE_NAMES = {str: "a text", int: "a whole number", list: "a list"}


@dataclass(frozen=True)
class FileTask:
    """Base class of the tasks on one file: all of research.evaluation.task.Task except `requests`."""

    name: str
    options: Settings
    path: Path
    USES: ClassVar[tuple[str, ...]] = ("limit",)
    """The names of the settings that the task uses."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the task uses, as JSON data."""
        return {name: getattr(self.options, name) for name in self.USES}

    def digest(self, context: TaskContext) -> str:
        """SHA-256 of the file, in hexadecimal."""
        return file_digest(self.path)


def file_digest(path: Path) -> str:
    """SHA-256 of a user's file, in hexadecimal. A Mistake if it cannot be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror}) → check the file and its permissions") from error


def check_file(path: Path, task: str, suffixes: tuple[str, ...]) -> Path:
    """Returns the path if it is a file with one of the suffixes; raises a Mistake that names the task if not."""
    if not path.name.endswith(suffixes):
        raise Mistake(f"{task}: {path.name} is not a kind of file that this task reads → use {' or '.join(suffixes)}")
    if not path.is_file():
        raise Mistake(f"{task}: {path} {'is a folder' if path.is_dir() else 'does not exist'} → name a {' or '.join(suffixes)} file")
    return path


@dataclass(frozen=True)
class Row:
    """The object on one line of a .jsonl file, and where it is."""

    where: str
    fields: dict[str, Any]

    def mistake(self, problem: str, example: str) -> Mistake:
        """The Mistake to raise: what is wrong with the line, and an example of a correct one."""
        return Mistake(f"{self.where} {problem} → write lines such as {example}")


def rows(path: Path, needs: Mapping[str, type], example: str) -> Iterator[Row]:
    """The objects of a .jsonl file, without blank lines. Each must have the fields in `needs`, with these types."""
    empty = True
    for place, line in read_lines(path):
        if not line.strip():
            continue
        empty, row = False, Row(place, json_value(line, place, f"lines such as {example}"))
        if not isinstance(row.fields, dict):
            raise row.mistake("is not an object", example)
        for name, required in needs.items():
            value = row.fields.get(name)
            if not isinstance(value, required) or isinstance(value, bool):
                raise row.mistake(f'has no "{name}" that is {TYPE_NAMES[required]}', example)
            for text in (part for part in (value if isinstance(value, list) else [value]) if isinstance(part, str)):
                refuse_half_characters(text, place)
        yield row
    if empty:
        raise Mistake(f"{path} has no examples → write lines such as {example}")


def continuation(tokenizer: Tokenizer, context: str, following: str, length: int, where: str = "a text") -> ScoreRequest:
    """The request to score `following` after `context`. A context that is too long loses its beginning.

    Raises a Mistake if `following` adds no token or does not fit into `length` tokens.
    """
    before, after = context_and_continuation(tokenizer, context, following)
    if not after:
        raise Mistake(f"{where}: {following!r} adds no token to its context → give it text of its own")
    if len(after) >= length:
        raise Mistake(f"{where}: {len(after)} tokens are to be scored, the model takes {length - 1} → shorten the text")
    return ScoreRequest(tuple((before + after)[-length:]), len(after))


def context_and_continuation(tokenizer: Tokenizer, context: str, following: str) -> tuple[list[int], list[int]]:
    """The tokens of the context and those of the continuation, both tokenized as one text.

    White space at the end of the context belongs to the continuation. The split is after as many tokens as the context has alone.
    An empty context is replaced by end-of-text.
    """
    if not context:
        ids = tokenizer.encode(following)
        begins_with_end = ids[:1] == [tokenizer.end_of_text]
        return ([tokenizer.end_of_text], ids[1:] if begins_with_end else ids)
    whole, context_ids = tokenizer.encode(context + following), tokenizer.encode(context.rstrip())
    return whole[: len(context_ids)], whole[len(context_ids) :]


def accuracy(name: str, correct: Sequence[float]) -> Metric:
    """The mean of zeros and ones, with its standard error."""
    return Metric(name, statistics.mean(correct), statistics.of_mean(correct), higher_is_better=True)
