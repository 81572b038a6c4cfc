"""Reads prompts from a file or standard input: one per line, or one JSON object per line. Imports no torch."""

import json
import sys
from pathlib import Path

from parallel.errors import Mistake

JSON_LINES = ".jsonl"
STANDARD_INPUT = "-"


def read(name: str) -> list[str]:
    """The prompts of a file. In a .jsonl file each line is an object with a `prompt`, or a string.

    In any other file, and from standard input ("-"), each line that is not empty is a prompt.
    """
    try:
        content = sys.stdin.buffer.read() if name == STANDARD_INPUT else Path(name).read_bytes()
        lines = content.decode().replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise Mistake(f"--file {name} cannot be read ({error.strerror}) → name a .txt or .jsonl file, or - for standard input") from None
    except UnicodeDecodeError as error:
        raise Mistake(f"--file {name} is not UTF-8 at byte {error.start} → convert it") from None

    if Path(name).suffix == JSON_LINES:
        prompts = [_json_prompt(line, f"{name}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    else:
        prompts = [line for line in lines if line]
    if not prompts:
        raise Mistake(f'{name} holds no prompt → write one a line, or in a .jsonl file {{"prompt": "…"}} a line')
    return prompts


def check(prompt: str) -> str:
    """Returns the prompt if it can be encoded as UTF-8; raises a Mistake if not.

    A terminal passes bytes that are not UTF-8 on as lone surrogates.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise Mistake(f"the prompt {ascii(prompt)[:60]} is not UTF-8 → set the terminal's encoding to UTF-8, or use --file") from None
    return prompt


def _json_prompt(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Mistake(f'{where} is not JSON ({error}) → write {{"prompt": "…"}}') from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise Mistake(f'{where} has no prompt that is text → write {{"prompt": "…"}}')
    return check(prompt)
