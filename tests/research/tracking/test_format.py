"""Paths, and text that a model wrote, as they are shown in a terminal or written to a file."""

import json
from pathlib import Path

import pytest

from research.tracking.format import json_line, layout, printable, short_path


def test_json_keeps_what_a_terminal_is_not_shown():
    """The escapes of `printable` cannot be told from the same letters; those of JSON can."""
    assert json.loads(json_line(r"\x1b")) != json.loads(json_line("\x1b")) and printable("\x1b") == r"\x1b"


def test_everything_else_stays():
    """Newlines, tabs, other scripts, emoji, no-break spaces."""
    text = "a\n\tb € ½ 漢 שלום \u00a0 👩🚀 \N{REPLACEMENT CHARACTER}"
    assert printable(text) == text


@pytest.mark.parametrize("text", ["€ ½ 漢", 'a"b\\c\nd\te', "\x1b[31m\x9b\x7f\u202e", "\ud800 half", "👩\u200d🚀"])
def test_json_lines_say_the_same_and_steer_nothing(text):
    line = json_line({"text": text})
    assert json.loads(line) == {"text": text}
    assert "\n" not in line and printable(line) == line


def test_json_lines_are_readable():
    assert json_line({"a": "€ 漢"}) == '{"a": "€ 漢"}'
    with pytest.raises(ValueError):
        json_line(float("nan"))


def test_paths_are_as_one_would_type_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [short_path(path) for path in (tmp_path / "runs", Path("runs"), Path("/x"), Path("../x"))] == ["runs", "runs", "/x", "../x"]


def test_a_layout_is_written_in_one_way():
    assert layout(1, 2, 4) == "pipe 1 × data 2 × tensor 4"
    assert layout(2, 1, 1, 1, sequence=True) == "pipe 2 × data 1 × tensor 1 · ZeRO-1"  # one tensor rank has nothing to split
    everything = {"sequence": True, "recompute": "full", "offload_optimizer": True, "offload_parameters": True}
    said = "pipe 1 × data 2 × tensor 2 · sequence parallel · ZeRO-3 · optimizer and parameters in host memory · full recomputation"
    assert layout(1, 2, 2, 3, **everything) == said
    assert max(map(len, said.split(" · "))) < 64  # W&B's limit of a tag
