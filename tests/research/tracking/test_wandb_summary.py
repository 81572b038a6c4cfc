"""Figures in the summary of a run that has ended, with the real W&B client: offline beside the run's own, online in the run itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.files import read_json, write_json
from research.tracking import run_folder, wandb_record, wandb_summary
from research.tracking.run_folder import RunFolder
from tests.research.helpers import wandb_servers as servers
from tests.research.tracking import test_tracker as training
from tests.research.tracking.test_run_lock import elsewhere

FIGURES = {"eval/lambada/accuracy": 0.45, "eval/validation/loss": 3.5}


def add(path: str) -> None:
    """What an evaluation's process does."""
    print(json.dumps(wandb_summary.add(RunFolder(Path(path)), FIGURES)))


def added(folder: RunFolder, place: Path, server: str = "", **more: str) -> str:
    """`add` in a process of its own with an empty home."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(place / "home"), "PYTHONPATH": str(training.ROOT)} | more
    if server:
        environment |= {"WANDB_API_KEY": training.KEY, "WANDB_BASE_URL": server}
    code = f"from tests.research.tracking.test_wandb_summary import add; add({str(folder.path)!r})"
    finished = subprocess.run([sys.executable, "-c", code], cwd=place, env=environment, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0 and finished.stderr == "", finished.stderr
    return json.loads(finished.stdout)


def segments(folder: RunFolder) -> list[list[dict]]:
    """The records of each offline folder, in order of time, as W&B's own reader prints them."""
    found = []
    for path in wandb_record.files_of(folder):
        reader = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", path]
        text = subprocess.run(reader, capture_output=True, text=True, check=True, timeout=60).stdout
        found.append([json.loads(line) for line in text.splitlines()])
    return found


@pytest.mark.slow
def test_an_offline_run_has_a_second_segment(tmp_path):
    """Within a sweep, where W&B draws the run's id, too; `wandb leet` then still opens the segment that has the rows."""
    sweep = {"WANDB_SWEEP_ID": "abcd1234"}
    folder = training.launch(tmp_path, environment=sweep)[0]["folder"]
    assert added(folder, tmp_path, **sweep) == f"W&B summary, offline (no API key) · later: wandb sync runs/gpt_sotu/{folder.id}/wandb"
    trained, evaluated = segments(folder)
    (run,), (first,) = training.of(evaluated, "run"), training.of(trained, "run")
    assert run["run_id"] == first["run_id"] == read_json(folder.wandb_json)["id"] != folder.title
    assert (run["run_group"], run["project"]) == ("gpt_sotu", first["project"])
    assert (run["tags"], run["job_type"]) == (first["tags"], "ablation") and "mine" in run["tags"]
    (listed,) = [*folder.wandb.glob("run-*"), *folder.wandb.glob("offline-run-*")]  # by `wandb leet`
    assert listed.name == (folder.wandb / "latest-run").resolve().name == read_json(folder.wandb_json)["folder"]
    assert training.of(training.inspected(folder), "history") == training.of(trained, "history") != []
    told: dict = {}
    for record in training.of(evaluated, "summary"):
        told |= record["update"]
    assert {key: told[key] for key in FIGURES} == FIGURES
    assert told["train/lr"] == 1e-3 and told["train/loss"] is None  # the last one logged was nan
    assert told["val/bits_per_byte"] == {"min": 2.17, "last": 2.17} and told["progress/step"] == 20
    assert training.of(evaluated, "history") == [] and [told["exit_code"] for told in training.of(evaluated, "exit")] == [0]


def test_without_a_record_the_line_says_what_writes_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = run_folder.create(tmp_path / "runs", "a")
    write_json(folder.config, training.CONFIG)
    folder.wandb.mkdir()
    assert wandb_summary.add(folder, FIGURES).endswith(f"→ python -m research track runs/a/{folder.id} writes one, with these figures")


def test_a_run_that_w_b_knows_nothing_of_is_left_alone(tmp_path):
    folder = run_folder.create(tmp_path, "a")
    assert wandb_summary.add(folder, FIGURES) == "" and not folder.wandb.exists()


@pytest.fixture
def working():
    servers.Works.rows.clear()
    servers.Works.runs.clear()
    servers.Works.summaries.clear()
    yield servers.serve(servers.Works)


@pytest.mark.slow
def test_online_they_go_into_the_run(tmp_path, working):
    folder = training.launch(tmp_path, server=working)[0]["folder"]
    rows = len(servers.Works.rows)
    assert added(folder, tmp_path, working) == f"W&B summary, online · {working}/somebody/tessera/runs/{folder.title}"
    assert {run["name"] for run in servers.Works.runs} == {folder.title} and len(servers.Works.rows) == rows
    assert {key: servers.Works.summaries[-1][key] for key in FIGURES} == FIGURES


@pytest.mark.slow
def test_a_sync_of_both_segments_ends_with_both_kinds_of_figures(tmp_path, working):
    folder = training.launch(tmp_path)[0]["folder"]
    added(folder, tmp_path)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "WANDB_API_KEY": training.KEY, "WANDB_BASE_URL": working}
    wandb = Path(sys.executable).with_name("wandb")
    subprocess.run([wandb, "sync", folder.wandb], env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    last = servers.Works.summaries[-1]
    assert {key: last[key] for key in FIGURES} == FIGURES and last["val/bits_per_byte"] == {"min": 2.17, "last": 2.17}
    rows = [row for row in servers.Works.rows if not any(str(key).startswith("samples") for key in row)]
    assert len(rows) == len(training.ROWS) + len(training.SAMPLES) and len(servers.Works.rows) == len(rows) + 2  # two tables of samples
    assert {run["name"] for run in servers.Works.runs} == {folder.title}


def test_nothing_is_written_beside_a_holder_that_cannot_be_seen(tmp_path: Path) -> None:
    """It is on another host, and goes on or not: here nobody can say so at once. `track` listens to it."""
    folder = RunFolder(tmp_path / "runs" / "gpt" / "aaaaaa")
    folder.wandb.mkdir(parents=True)
    write_json(folder.config, {"track": {"mode": "offline"}})
    record = elsewhere(folder.lock)
    before = sorted(folder.path.rglob("*"))
    assert "the run may be in use on another host → python -m research track " in wandb_summary.add(folder, FIGURES)
    assert sorted(folder.path.rglob("*")) == before
    record.write_bytes(record.read_bytes().replace(b'"released": false', b'"released": true '))
    assert "W&B has no record of this run" in wandb_summary.add(folder, FIGURES)
