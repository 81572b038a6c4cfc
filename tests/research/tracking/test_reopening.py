"""A record that goes on: later rows leave it and are kept, whatever was torn."""

import json
from pathlib import Path

from parallel.files import read_json
from research.tracking import metrics, run_folder
from research.tracking.run_folder import RunFolder, create, start


def folder(tmp_path: Path) -> RunFolder:
    made = create(tmp_path, "x")
    start(made, layout="pp1", precision="fp32", steps=9)
    rows = [json.dumps({"progress/step": step, "train/loss": 0.1 * step}) for step in (1, 2, 3, 4)]
    made.metrics.write_text("\n".join(rows) + '\n{"progress/step": 5, "trai')
    made.samples.write_text(json.dumps({"progress/step": 2, "text": "a"}) + "\n")
    return made


def test_rows_after_the_checkpoint_leave_and_are_kept(tmp_path: Path) -> None:
    made = folder(tmp_path)
    assert run_folder.reopen(made, 2, {"layout": "pp2", "steps": 12}) == 2
    assert [row["progress/step"] for row in metrics.read(made.metrics)] == [1, 2]
    assert made.metrics.read_text().splitlines()[-1] == json.dumps({"progress/step": 2, "train/loss": 0.2})  # the torn line is gone
    kept = list(metrics.read(made.path / "dropped.jsonl"))
    assert [(row["segment"], row["file"], row["progress/step"], row["train/loss"]) for row in kept] == [
        (2, "metrics.jsonl", 3, 0.1 * 3),
        (2, "metrics.jsonl", 4, 0.1 * 4),
    ]
    run = read_json(made.run)
    assert (run["status"], run["layout"], run["steps"], run["precision"]) == ("running", "pp2", 12, "fp32")
    assert [segment["from_step"] for segment in run["segments"]] == [0, 2]
    assert run_folder.reopen(made, 2, {}) == 3 and len(list(metrics.read(made.path / "dropped.jsonl"))) == 2


def test_a_number_that_json_has_not_survives_the_cut(tmp_path: Path) -> None:
    made = folder(tmp_path)
    made.metrics.write_text(
        metrics.encode({"progress/step": 1, "train/loss": float("nan")}) + "\n" + json.dumps({"progress/step": 9}) + "\n"
    )
    run_folder.reopen(made, 1, {})
    (row,) = metrics.read(made.metrics)
    assert row["train/loss"] != row["train/loss"]
