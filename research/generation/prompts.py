"""Prompts from the command line or a file: a line of text each, or a line of JSON. Imports no torch."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from parallel.errors import Mistake

LINES, JSON_LINES = ".txt", ".jsonl"
STANDARD_INPUT = "-"


def read(name: str) -> list[str]:
    """The prompts of a file: .jsonl, objects with a `prompt` (or strings); anything else, and - for standard input, a prompt a line."""
    found = [prompt for number, line in enumerate(_lines(name), 1) if (prompt := _prompt(name, number, line)) is not None]
    if not found:
        raise Mistake(f'{name} holds no prompt → write one a line, or in a .jsonl file {{"prompt": "…"}} a line')
    return found


def check(prompt: str) -> str:
    """The prompt, if it is text: a terminal passes on bytes that are no UTF-8 as halves of characters."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise Mistake(f"the prompt {ascii(prompt)[:60]} is not UTF-8 → set the terminal's encoding to UTF-8, or use --file") from None
    return prompt


def _prompt(name: str, number: int, line: str) -> str | None:
    """The prompt in a line; None in an empty one."""
    if Path(name).suffix != JSON_LINES:
        return line or None
    if not line.strip():
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Mistake(f'{name}:{number} is not JSON ({error}) → write {{"prompt": "…"}}') from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise Mistake(f'{name}:{number} has no prompt that is text → write {{"prompt": "…"}}')
    return check(prompt)


def _lines(name: str) -> Iterator[str]:
    try:
        content = sys.stdin.buffer.read() if name == STANDARD_INPUT else Path(name).read_bytes()
        yield from content.decode().replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise Mistake(f"--file {name} cannot be read ({error.strerror}) → name a .txt or .jsonl file, or - for standard input") from None
    except UnicodeDecodeError as error:
        raise Mistake(f"--file {name} is not UTF-8 at byte {error.start} → convert it") from None
