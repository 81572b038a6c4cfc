"""metrics.jsonl: strict JSON on every line, flushed, readable after any kill."""

import errno
import json
import math
import resource
import signal

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
    lines = ['{"a": 1}', "[1]", "5", "[" * 100_000, '{"non_finite": 5}', '{"non_finite": {"a": "b"}}', "null"]
    assert [metrics.decode(line) for line in lines] == [{"a": 1}, *[None] * 6]


def test_a_whole_number_that_only_a_stranger_writes_is_a_float():
    """JSON's have any number of digits, and Python's ints beyond 1e308 make every later computation with floats fail."""
    assert [metrics.decode('{"a": ' + digits + "}") for digits in ("9" * 18, "9" * 19, "9" * 5000, "-" + "9" * 400)] == [
        {"a": 10**18 - 1}, {"a": 1e19}, {"a": math.inf}, {"a": -math.inf}
    ]  # fmt: skip


@pytest.fixture
def limited(monkeypatch):
    """The kernel refuses a file longer than this, after it has taken a part of the write: EFBIG, as ENOSPC on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_row_that_the_disk_refuses_leaves_no_part_and_is_written_later(tmp_path, limited):
    path = tmp_path / "metrics.jsonl"
    rows, lines = [{"progress/step": step, "text": "x" * 50} for step in range(1, 6)], JsonLines(path)
    for row in rows[:2]:
        lines.write(row)
    limited(path.stat().st_size + 30)
    for number, row in enumerate(rows[2:4], 1):
        with pytest.raises(OSError, match="metrics.jsonl") as refused:
            lines.write(row)
        assert refused.value.errno == errno.EFBIG and list(metrics.read(path)) == rows[:2]
        assert path.read_bytes().endswith(b"}\n") and len(lines.waiting) == number
    limited(10**6)
    lines.write(rows[4])
    assert list(metrics.read(path)) == rows and lines.waiting == []
    lines.close()
    lines.close()


def test_rows_that_were_refused_are_written_at_the_end_or_kept_by_a_checkpoint(tmp_path, limited):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    limited(10)
    with pytest.raises(OSError, match="metrics.jsonl"):
        lines.write({"progress/step": 1})
    kept = lines.waiting
    lines.close()
    assert path.read_bytes() == b"" and kept == ['{"progress/step": 1}']
    limited(10**6)
    again = JsonLines(path)
    for _ in range(2):  # also if the first launch has got it through after its checkpoint
        again.write_missing([*kept, "no row"])
    assert list(metrics.read(path)) == [{"progress/step": 1}] and path.read_bytes().count(b"\n") == 1
    again.close()


def test_a_resume_that_misses_no_row_does_not_read_the_file(tmp_path):
    """It may be a gigabyte, and almost every resume misses none."""
    rows = JsonLines(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").unlink()
    rows.write_missing([])
    with pytest.raises(FileNotFoundError):
        rows.write_missing(["{}"])
    rows.close()
