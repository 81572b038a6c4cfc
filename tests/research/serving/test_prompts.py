"""The page's example prompts: beginnings of the held-out text, whatever kind of file it is; neutral ones where there is none."""

import json

import pytest

from research import ROOT
from research.data.documents import documents
from research.serving import prompts
from research.serving.prompts import MOST_CHARACTERS, NEUTRAL, example_prompts, opening_words


def test_they_begin_documents_of_the_builtin_text():
    name = "builtin:state_of_the_union/val"
    found, texts = example_prompts(name, ROOT), list(documents(name, ROOT))
    assert len(found) == 4 and len({prompt.split()[0] for prompt in found}) == 4
    assert all(any(text.startswith(prompt) for text in texts) and len(prompt) <= MOST_CHARACTERS for prompt in found)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["One day in May\nThe second line is here", "Two days later"], ("One day in May", "Two days later", "The second line is here")),
        (["\n\n  a title\n\n It was  night.\n it was day again"], ("It was night.",)),
        (["One day in May", "one day in June"], ("One day in May",)),
        (["word " * 40, "x" * 500 + " y z"], ("word " * 8 + "word", "x" * MOST_CHARACTERS)),
        (["short", ""], ()),
        ([], ()),
    ],
)
def test_words_of_lines(texts, expected):
    assert opening_words(texts) == expected


def test_where_there_is_no_text(tmp_path, monkeypatch):
    assert example_prompts("not/there.txt", tmp_path) == NEUTRAL
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "x"}))
    (tmp_path / "good.jsonl").write_text(json.dumps({"text": "It was a dark night"}))
    assert example_prompts("bad.jsonl", tmp_path) == example_prompts("short.jsonl", tmp_path) == NEUTRAL
    assert example_prompts("good.jsonl", tmp_path) == ("It was a dark night",)
    monkeypatch.setattr(prompts, "LARGEST", 10)
    assert example_prompts("good.jsonl", tmp_path) == NEUTRAL, "a large file would delay the start"
