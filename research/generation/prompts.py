"""Reads prompts, or other texts, from a file or standard input: one per line, or one JSON object per line. Imports no torch."""

import sys
from pathlib import Path

from parallel.errors import Mistake
from parallel.text import json_value, lines, read_lines, refuse_half_characters

JSON_LINES = ".jsonl"
STANDARD_INPUT = "-"


def read(name: str, key: str = "prompt") -> list[str]:
    """The prompts of a file. In a .jsonl file each line is an object with a `prompt`, or a string. `key`: what the texts are instead.

    In any other file, and from standard input ("-"), each line that is not empty is a prompt.
    """
    if name == STANDARD_INPUT:
        placed = lines(sys.stdin.buffer, "standard input")
    else:
        placed = read_lines(Path(name), f"--file {name}", "name a .txt or .jsonl file, or - for standard input")
    if Path(name).suffix == JSON_LINES:
        prompts = [_json_text(line, place, key) for place, line in placed if line.strip()]
    else:
        prompts = [line for _, line in placed if line]
    if not prompts:
        raise Mistake(f"{name} holds no {key} → write one a line, or in a .jsonl file {_example(key)} a line")
    return prompts


def check(prompt: str, key: str = "prompt") -> str:
    """Returns the prompt, or the text that a Mistake calls `key`, if it can be encoded as UTF-8; raises a Mistake if not.

    A terminal passes bytes that are not UTF-8 on as lone surrogates.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise Mistake(f"the {key} {ascii(prompt)[:60]} is not UTF-8 → set the terminal's encoding to UTF-8, or use --file") from None
    return prompt


def _example(key: str) -> str:
    """A line of a .jsonl file."""
    return f'{{"{key}": "…"}}'


def _json_text(line: str, place: str, key: str) -> str:
    value = json_value(line, place, _example(key))
    prompt = value.get(key) if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise Mistake(f"{place} has no {key} that is text → write {_example(key)}")
    refuse_half_characters(prompt, place)
    return prompt
