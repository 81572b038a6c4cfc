"""The task fim:FILE: edit distance against a definition, prompts with and without sentinels, and the whole verb."""

import dataclasses
import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.cli import evaluate
from research.config import serialization
from research.data import tokenizer
from research.data.fill_in_middle import Sentinels
from research.evaluation import in_training, registry
from research.evaluation.infilling import first_lines, levenshtein, metrics_of, similarity
from research.evaluation.task import Settings
from research.tracking.own_runs import mark_as_own
from tests.research.helpers import untrained
from tests.research.helpers.example import sentence

LINES = [{"prefix": "def f(x):\n", "suffix": "\n", "middle": "    return x"}, {"prefix": "", "suffix": "é", "middle": "a\n"}]
TEXTS = st.text("abé\n", max_size=12)


@pytest.fixture
def file(tmp_path):
    def write(rows):
        path = tmp_path / "middles.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def requests_of(context, path, sentinels, length=65, limit=None):
    (task,) = registry.create_tasks([f"fim:{path}"], Settings(limit=limit))
    changes = dict(tokenizer=tokenizer.fixed("builtin:bytes+fim"), sentinels=sentinels, length=length)
    return task.texts(dataclasses.replace(context, **changes))


@settings(max_examples=60, deadline=None)
@given(one=TEXTS, other=TEXTS)
def test_levenshtein_is_its_recursive_definition(one, other):
    @functools.cache
    def distance(i, j):
        if not i or not j:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (one[i - 1] != other[j - 1]))

    assert levenshtein(one, other) == levenshtein(other, one) == distance(len(one), len(other))


def test_metrics_by_hand():
    assert levenshtein("kitten", "sitting") == 3 and similarity("kitten", "sitting") == 1 - 3 / 7 and similarity("", "") == 1
    exact, similar, lines, reads = metrics_of(["ab", "x", ""], ["ab", "xy", "abc"], True)
    assert (exact.value, exact.stderr) == (pytest.approx(1 / 3), pytest.approx(1 / 3)) and exact.higher_is_better
    assert (similar.value, similar.stderr) == (pytest.approx(0.5), pytest.approx(0.5 / 3**0.5)) and (reads.name, reads.value) == (
        "reads_suffix",
        1,
    )
    assert (lines.name, lines.value) == ("exact_lines", exact.value) and lines.higher_is_better
    values = {suffix: [one.value for one in metrics_of(["ab\nc", "x"], ["ab", "xy"], suffix)] for suffix in (True, False)}
    assert [one[0] for one in values.values()] == [0, 0.5] and [one[2] for one in values.values()] == [0.5, 0.5]


def test_as_many_lines_as_the_middle_has():
    assert first_lines("a\nb\nc", "x") == "a" and first_lines("a\nb\nc", "x\ny") == "a\nb" and first_lines("a", "x\ny") == "a"
    assert first_lines("a\nb\nc", "x\n") == "a\n" and first_lines("a", "x\n") == "a" and first_lines("", "x\n") == ""
    assert first_lines("a\nb\nc", "x\ny\n") == "a\nb\n" and first_lines("a\nb", "x\ny\n") == "a\nb"


def test_prompts_with_both_texts_and_with_the_prefix_alone(context, file):
    path = file(LINES)
    both, alone = requests_of(context, path, Sentinels(257, 258, 259), length=200), requests_of(context, path, None, length=200)
    assert [one.ids for one in both.requests] == [(257, *b"def f(x):\n", 258, *b"\n", 259), (257, 258, *"é".encode(), 259)]
    assert [one.ids for one in alone.requests] == [(*b"def f(x):\n",), (256,)]
    assert both.requests[0].ends == (256, 257, 258, 259) and alone.requests[0].ends == (256,)
    assert both.requests[0].max_new_tokens == 2 * 12 + 16 and both.examples == 2
    texts = ["    return x\n    more", "a\nb"]
    assert [metric.value for metric in alone.metrics(texts)] == [1, 1, 1, 0]
    assert [metric.value for metric in both.metrics(texts)][::3] == [0, 1]


def test_long_prompts_lose_the_beginning_of_the_prefix_and_the_end_of_the_suffix(context, file):
    path = file(
        [{"prefix": "p" * 70 + "P", "suffix": "S" + "s" * 70, "middle": "m"}, {"prefix": "P", "suffix": "S" + "s" * 70, "middle": "m"}]
    )
    both, short = requests_of(context, path, Sentinels(257, 258, 259)).requests
    assert both.ids == (257, *b"p" * 21, *b"P", 258, *b"S", *b"s" * 20, 259) and len(both.ids) + both.max_new_tokens == 64
    assert short.ids == (257, *b"P", 258, *b"S", *b"s" * 41, 259) and len(short.ids) + short.max_new_tokens == 64
    alone = requests_of(context, path, None, limit=1).requests[0]
    assert alone.ids == (*b"p" * 45, *b"P")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prefix": "a", "suffix": "b"}, 'line 1 has no "middle" that is a text → write lines such as {"prefix"'),
        ({"prefix": "a", "suffix": "b", "middle": ""}, 'line 1 has no "middle" that is not empty'),
        (
            {"prefix": "a", "suffix": "b", "middle": "m" * 40},
            "has a middle of 40 tokens, and of the 64 places of the model 32 are for",
        ),
    ],
)
def test_mistakes_name_the_line(line, message, context, file):
    assert message in sentence(lambda: requests_of(context, file([line]), None))


def test_it_is_not_evaluated_while_a_run_trains(file, tmp_path, folder):
    experiment = serialization.load(folder.config)
    experiment.evaluate = experiment.evaluate.model_copy(update={"tasks": (f"fim:{file(LINES)}",), "every": 5})
    assert "which is not done while it trains → evaluate it afterwards" in sentence(lambda: in_training.check_tasks(experiment, tmp_path))


def test_the_verb_says_whether_the_suffix_was_read(file, tmp_path, capsys):
    """A run without sentinels, and the same one as if it had been imported with them."""
    made, path = untrained.make(tmp_path, seq_length=128), file(LINES * 3)
    found = {}
    for name in ("alone", "both"):
        if name == "both":
            experiment = serialization.load(made.config)
            experiment.data.tokenizer, experiment.init_from = "builtin:bytes+fim", "elsewhere"
            serialization.save(experiment, made.config)
            mark_as_own(made)
        evaluate.main([str(made.path), "--tasks", f"fim:{path}", "--json"])
        (row,) = map(json.loads, capsys.readouterr().out.splitlines())
        found[name] = row["metrics"]
        assert row["examples"] == 6 and 0 <= row["metrics"]["edit_similarity"]["value"] < 1
    assert (found["alone"]["reads_suffix"]["value"], found["both"]["reads_suffix"]["value"]) == (0, 1)
    assert found["both"]["exact_match"] == {"value": 0.0, "stderr": 0.0, "higher_is_better": True}
