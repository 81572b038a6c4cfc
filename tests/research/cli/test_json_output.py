"""--json: strict JSON on standard output alone, whatever the terminal can write; and no verb waits for torch to show its help."""

import io
import json
import math
import subprocess
import sys

import pytest

from research import ROOT
from research.cli import inspect, verify
from research.cli.json_output import print_json
from research.cli.verbs import VERBS
from research.tracking import metrics, run_folder
from research.tracking.run_folder import RunFolder
from research.tracking.streams import ESCAPING

ALL_HELPS = """
import contextlib, io, sys
from research import __main__ as command
for verb in sys.argv[1:]:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        command.main([verb, "--help"])
    heavy = {"torch", "deepspeed", "transformers", "wandb"} & set(sys.modules)
    assert shown.getvalue().startswith("usage: python -m research " + verb), verb
    assert not heavy, (verb, heavy)
"""


def test_no_help_imports_torch() -> None:
    finished = subprocess.run([sys.executable, "-c", ALL_HELPS, *VERBS], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_json_comes_back_equal_through_any_encoding(encoding: str, monkeypatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=ESCAPING)
    monkeypatch.setattr(sys, "stdout", stream)
    value = {"text": 'é → … 😀 "\n\x1b', "numbers": [math.nan, math.inf, -math.inf, 0.1, 2**60]}
    print_json(value)
    line = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert line.count("\n") == 1 and "\x1b" not in line
    assert json.loads(line) == {"text": value["text"], "numbers": ["nan", "inf", "-inf", 0.1, 2**60]}


def test_two_compared_runs_as_json(tmp_path, capsys) -> None:
    folders = []
    for number, losses in enumerate(([2.0, 1.0], [2.0, 1.1])):
        folder = RunFolder(tmp_path / "x" / f"run{number}")
        folder.path.mkdir(parents=True)
        folder.run.write_text("{}")
        rows = [{"progress/step": step, "train/loss": loss} for step, loss in enumerate(losses, 1)]
        folder.metrics.write_text("".join(metrics.encode(row) + "\n" for row in rows) + '{"train/loss": 3.0}\n{"progress/step": []}\n')
        folders.append(str(folder.path))
    with pytest.raises(SystemExit) as left:
        verify.main(["--against", *folders, "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert left.value.code == 1 and row["key"] == "train/loss" and row["step"] == 2 and row["rows"] == 2
    assert row["worst_difference"] == pytest.approx(0.1 / 1.1)


def test_a_run_file_of_a_stranger_is_refused_or_shown_but_never_a_traceback(tmp_path, capsys) -> None:
    """A field of a wrong type is named. The run that is shown has no checkpoint, which is the Mistake."""
    folder = run_folder.create(tmp_path, "x")
    for text, words in (
        ('{"segments": 5}', "run.json: segments = 5 is not what a run writes"),
        ('{"segments": [1, {"from_step": 0}]}', r"run.json: segments.0 = 1 is not"),
        ('{"status": {}}', "run.json: status = {} is not"),
        ('{"segments": [{"from_step": 0}], "pid": "a"}', "holds no complete checkpoint"),
    ):
        folder.run.write_text(text)
        with pytest.raises(ValueError, match=words):
            inspect.main([str(folder.path), "--json"])
    captured = capsys.readouterr()
    assert captured.out == "" and "segment  1 · from step 0" in captured.err
