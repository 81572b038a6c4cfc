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


@pytest.mark.parametrize(("name", "content"), [("a.txt", "My fellow\r\n½"), ("a.jsonl", '"My fellow"\r\n{"prompt": "½"}\r\n')])
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path, monkeypatch, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig", newline="")
    assert prompts.read(str(tmp_path / name)) == ["My fellow", "½"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfMy fellow\r\n")))
    assert prompts.read("-") == ["My fellow"]


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a\nb €".encode())))
    assert prompts.read("-") == ["a", "b €"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no prompt"),
        (b"\n\n", "holds no prompt"),
        (b'{"prompt": 5}', "line 1 has no prompt that is text"),
        (b'{"text": "x"}', "line 1 has no prompt that is text"),
        (b'{"prompt": "x"}\n[1]', "line 2 has no prompt that is text"),
        (b'{"prompt": "x"}\n{"prompt"', "line 2 is not JSON"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b'{"prompt": "\\ud800"}', "line 1 has half a surrogate pair at character 0"),
        (b'{"prompt": "x"}\n\xff', "line 2 is not UTF-8 (byte 0"),
        (b"9" * 5000, "line 1 is not JSON"),
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
