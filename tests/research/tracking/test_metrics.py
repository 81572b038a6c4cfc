"""metrics.jsonl: strict JSON on every line, flushed, readable after any kill."""

import json
import math

import numpy as np
import pytest
import torch

from research.tracking import metrics
from research.tracking.metrics import JsonLines


def strictly(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_row_is_on_disk_before_the_next_and_comes_back_equal(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows, lines = [{"train/loss": 1 / 3, "progress/step": 1}, {"val/loss": 2.0, "progress/step": 2, "text": "é\u2028\n"}], JsonLines(path)
    for i, row in enumerate(rows):
        lines.write(row)
        assert list(metrics.read(path)) == rows[: i + 1]  # the file is still open
    assert len(path.read_text("utf-8").split("\n")) == 3


@pytest.mark.parametrize(("value", "name"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_what_json_cannot_say_is_null_and_named(value, name):
    row = {"a": value, "b": 1.5}
    assert strictly(metrics.encode(row)) == {"a": None, "b": 1.5, "non_finite": {"a": name}}
    back = metrics.decode(metrics.encode(row))
    assert back.keys() == row.keys() and repr(back["a"]) == repr(value)


def test_scalars_of_numpy_and_torch_are_numbers():
    row = {"a": np.float32(0.5), "b": torch.tensor(2), "c": np.int64(3), "d": torch.tensor(math.nan)}
    assert strictly(metrics.encode(row)) == {"a": 0.5, "b": 2, "c": 3, "d": None, "non_finite": {"d": "nan"}}


def test_a_line_torn_by_a_kill_costs_only_itself(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a": 2, "tor')
    JsonLines(path).write({"a": 3})
    assert [row["a"] for row in metrics.read(path)] == [1, 3]
    assert metrics.last(path, ["a"]) == {"a": 3}


def test_a_lone_surrogate_is_still_json(tmp_path):
    path = tmp_path / "samples.jsonl"
    JsonLines(path).write({"text": "a\udc80b"})
    assert list(metrics.read(path)) == [{"text": "a\udc80b"}]


def test_the_last_value_of_each_key(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1, "b": 1}\n{"a": 2}\n[1]\n\n')
    assert metrics.last(path, ("a", "b", "c")) == {"a": 2, "b": 1}
    assert metrics.last(tmp_path / "none", ("a",)) == {}


def test_a_line_that_no_run_writes_is_no_row():
    lines = ['{"a": 1}', "[1]", "5", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", '{"non_finite": 5}', '{"non_finite": {"a": "b"}}', "null"]
    assert [metrics.decode(line) for line in lines] == [{"a": 1}, *[None] * 7]
