"""The W&B mirror: a slow W&B loses nothing and delays nothing, and an offline run that broke is written again from the run's files."""

import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parallel.files import write_json
from research.tracking import metrics, run_folder, wandb_mirror
from research.tracking.tracker import Tracker
from research.tracking.wandb_client import Opened
from tests.research.tracking.test_tracker import (
    CONFIG,
    DESCRIPTION,
    LATER,
    ROWS,
    SAMPLES,
    assert_has_artifact_and_alert,
    inspected,
    launch,
    of,
    tables,
    untabled,
)

LONG = 30.0


class SlowWandb:
    """Stands in for a W&B client on a busy machine: the run opens when `ready` is set. Collects what it is given."""

    def __init__(self, mode: str = "offline") -> None:
        self.ready, self.rows, self.ended = threading.Event(), [], []
        self.mode = mode

    def open_run(self, *_: Any) -> Opened:
        assert self.ready.wait(LONG)
        run = SimpleNamespace(log=self.rows.append, finish=lambda exit_code: self.ended.append(exit_code), url="https://example.org/run")
        return Opened(self.mode, "no API key", run)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowWandb:
    """A W&B that is not there when the header is printed."""
    client = SlowWandb()
    monkeypatch.setattr(wandb_mirror, "open_run", client.open_run)
    monkeypatch.setattr(wandb_mirror, "end_process", lambda: True)
    monkeypatch.setattr(wandb_mirror, "HEADER_SECONDS", 0.01)
    return client


@pytest.fixture
def tracker(tmp_path: Path, slow: SlowWandb, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """A tracker that has logged everything before W&B is there."""
    monkeypatch.chdir(tmp_path)
    folder = run_folder.create(Path("runs"), "gpt")
    run_folder.start(folder, layout="tensor 2", precision="fp32", steps=20)
    write_json(folder.config, CONFIG)
    made = Tracker(folder, DESCRIPTION, "auto")
    assert made.line == f"W&B is still starting · {folder.metrics}"
    for row in ROWS:
        made.log(row)
    return made


def test_a_w_b_that_starts_late_gets_every_row_in_order(tracker: Tracker, slow: SlowWandb) -> None:
    assert slow.rows == []
    slow.ready.set()
    tracker.finish()
    assert repr(slow.rows) == repr(ROWS) and slow.ended == [0]
    assert len(tracker.notes) == 1 and tracker.notes[0].startswith("W&B started late · offline (no API key) · later: wandb sync runs/gpt/")


def test_a_w_b_that_never_starts_holds_up_nothing_and_the_hint_says_what_writes_it(
    tracker: Tracker, slow: SlowWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_mirror, "STOPPED_SECONDS", 0.01)
    began = time.monotonic()
    tracker.finish("interrupted")
    assert time.monotonic() - began < LONG / 2
    (note,) = tracker.notes
    assert "did not take everything in time → metrics.jsonl has every row: `python -m research track runs/gpt/" in note
    slow.ready.set()


def test_what_w_b_does_without_costs_a_note_and_no_row(tracker: Tracker, slow: SlowWandb) -> None:
    """This client knows no alerts and no artifacts, and the store is not there; the row after them is taken all the same."""
    tracker.alert("skipped a step", "step 3: the loss is nan")
    tracker.refer_to_store(Path("nowhere"), {})
    tracker.log(LATER)
    slow.ready.set()
    tracker.finish()
    assert repr(slow.rows) == repr([*ROWS, LATER]) and slow.ended == [0]
    assert [note.partition(" (")[0] for note in tracker.notes][:2] == ["W&B could not send an alert", "W&B could not refer to files"]


def test_an_online_address_that_comes_late_is_shown_at_the_end(tracker: Tracker, slow: SlowWandb) -> None:
    slow.mode = "online"
    slow.ready.set()
    tracker.finish()
    assert tracker.notes == ["W&B started late · online · https://example.org/run"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_offline_run_whose_process_died_is_written_again(number: int, tmp_path: Path) -> None:
    told, errors = launch(tmp_path, kill=int(number))
    folder = told["folder"]
    assert told["notes"] == [] and errors == ""
    assert [path.name for path in folder.wandb.iterdir() if "offline-run" in path.name] == [(folder.wandb / "latest-run").resolve().name]
    later = [LATER] if number == signal.SIGKILL else []
    assert repr(list(metrics.read(folder.metrics))) == repr([*ROWS, *later])
    first, wild, *others, _, _, sample = untabled(folder)
    assert [first, *others] == [ROWS[0], ROWS[2], *later]
    assert tables(folder)[-1]["data"] == [[*row.values()] for row in SAMPLES]
    assert (wild["train/loss"], wild["train/grad_norm"]) == ("NaN", "Infinity") and sample["sample/text"] == "of the United States"
    assert_has_artifact_and_alert(folder)
    (record,) = of(inspected(folder), "run")
    assert record["run_id"] == folder.title and record["run_group"] == "gpt_sotu" and "model" in record["config"]["update"]
    assert {"train/*", "val/*"} <= {metric.get("glob_name") for metric in of(inspected(folder), "metric")}
    assert [ended["exit_code"] for ended in of(inspected(folder), "exit")] == [0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_dead_wandb_process_costs_the_mirror_at_most(number: int, tmp_path: Path) -> None:
    told, errors = launch(tmp_path, kill=int(number), again=False)
    assert len(told["notes"]) == 1 and "metrics.jsonl has every row" in told["notes"][0] and "Traceback" not in errors
    assert len(list(metrics.read(told["folder"].metrics))) == len(ROWS) + (number == signal.SIGKILL)
    assert len(list(metrics.read(told["folder"].samples))) == len(SAMPLES)
    assert len([path for path in told["folder"].wandb.iterdir() if "offline-run" in path.name]) == 1
