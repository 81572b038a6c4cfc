"""Prompts are read from lines, JSON lines and standard input; an error names the line."""

import io
import sys

import pytest

from research.generation import prompts
from tests.research.helpers.example import sentence


def test_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('My fellow\n\n  indented "quoted" \r\n€ ½\n', encoding="utf-8")
    assert prompts.read(str(path)) == ["My fellow", '  indented "quoted" ', "€ ½"]


def test_json_lines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "two\\nlines", "id": 7}\n\n"bare"\n{"prompt": ""}\n', encoding="utf-8")
    assert prompts.read(str(path)) == ["two\nlines", "bare", ""]


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a\nb €".encode())))
    assert prompts.read("-") == ["a", "b €"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no prompt"),
        (b"\n\n", "holds no prompt"),
        (b'{"prompt": 5}', ":1 has no prompt that is text"),
        (b'{"text": "x"}', ":1 has no prompt that is text"),
        (b'{"prompt": "x"}\n[1]', ":2 has no prompt that is text"),
        (b'{"prompt": "x"}\n{"prompt"', ":2 is not JSON"),
        (b"[" * 100_000, ":1 is not JSON"),
        (b'{"prompt": "\\ud800"}', "is not UTF-8"),
        (b"\xff", "is not UTF-8 at byte 0"),
    ],
)
def test_what_is_no_prompt_is_said(content, words, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    assert words in sentence(lambda: prompts.read(str(path)))


def test_a_missing_file_is_said(tmp_path):
    assert "cannot be read (No such file" in sentence(lambda: prompts.read(str(tmp_path / "none.txt")))
    assert "cannot be read (Is a directory)" in sentence(lambda: prompts.read(str(tmp_path)))


def test_bytes_of_a_terminal_that_are_no_text_are_said():
    assert prompts.check("€") == "€"
    assert "'\\udcff' is not UTF-8" in sentence(lambda: prompts.check("\udcff"))
