"""`python -m research track`, with the real W&B client: a run that was trained without W&B gets a whole one, once."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from parallel.errors import Mistake
from parallel.files import read_json, write_json
from research import ROOT
from research.cli import track
from research.tracking import run_folder, run_status, wandb_record
from research.tracking.acquire_lock import Held
from research.tracking.console import Console
from research.tracking.metrics import JsonLines
from research.tracking.plot import loss_curve
from research.tracking.run_folder import RunFolder
from research.tracking.wandb_client import Opened
from tests.research.helpers import wandb_servers as servers
from tests.research.tracking.test_tracker import CONFIG, KEY, ROWS, SAMPLES, inspected, of
from tests.research.tracking.test_wandb_artifacts import checkpoint

RESULT = {
    **{"task": "lambada", "settings": {}, "data_sha256": "d", "tokenizer_sha256": "t", "precision": "fp32"},
    **{"examples": 9, "seconds": 1.0, "tensor": 1, "batch": 8, "ended": "2026-01-01T10:00:00+00:00"},
    "metrics": {"accuracy": {"value": 0.25, "stderr": None, "higher_is_better": True}},
}
FIGURES = {"eval/lambada/accuracy": 0.25}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A finished run without W&B, with samples, a loss curve and the results of an evaluation."""
    monkeypatch.chdir(tmp_path)
    made = run_folder.create(Path("runs"), "gpt")
    run_folder.start(made, layout="tensor 2", precision="fp32", steps=20, commit="1a2b3c4", dirty=False)
    write_json(made.config, CONFIG | {"track": CONFIG["track"] | {"mode": "disabled"}})
    for path, rows in ((made.metrics, ROWS), (made.samples, SAMPLES)):
        file = JsonLines(path)
        for row in rows:
            file.write(row)
        file.close()
    run_folder.end(made, run_folder.FINISHED)
    return made


def tracked(folder: RunFolder, *argv: str, **environment: str) -> list[str]:
    """The lines that the verb prints, in a process of its own with an empty home."""
    command = [sys.executable, "-m", "research", "track", str(folder.path), *argv]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder.path.absolute() / "home"), "PYTHONPATH": str(ROOT)} | environment
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0 and finished.stderr == "", finished.stderr
    return finished.stdout.splitlines()


def evaluated(folder: RunFolder) -> None:
    """Gives the run the results of an evaluation."""
    (folder.path / "evaluations").mkdir()
    write_json(folder.path / "evaluations" / "step_000020.json", {"schema": 1, "results": [RESULT]})


@pytest.mark.slow
def test_a_run_without_w_b_gets_a_whole_one_and_only_once(folder: RunFolder) -> None:
    evaluated(folder)
    checkpoint(folder, 20)
    loss_curve(folder.metrics, folder.loss_png, folder.title)
    place = f"{folder.path}/wandb"
    head, *ways = tracked(folder)
    assert head == f"{folder.title} · W&B offline (no API key) · {len(ROWS) + len(SAMPLES)} rows and 1 result of evaluations"
    assert ways == [f"view     wandb leet {place}", f"upload   wandb sync {place}"]

    records = inspected(folder)
    (about,) = of(records, "run")
    assert (about["run_id"], about["project"], about["run_group"]) == (folder.title, "tessera", "gpt")
    assert (about["tags"], about["job_type"]) == (["tensor 2", "fp32", "mine"], "ablation")
    assert about["config"]["update"]["model"] == CONFIG["model"] and about["config"]["update"]["git"]["commit"] == "1a2b3c4"
    *rows, table, picture = [row["item"] for row in of(records, "history")]
    assert [row["progress/step"] for row in rows] == [10, 20, 20, 20, 20, 20] and rows[2]["val/bits_per_byte"] == 2.17
    assert table["samples.nrows"] == len(SAMPLES)
    (offline,) = folder.wandb.glob(wandb_record.OFFLINE)
    assert (offline / "files" / picture["loss_curve.path"]).read_bytes() == folder.loss_png.read_bytes()
    assert {name: value for record in of(records, "summary") for name, value in record["update"].items() if name in FIGURES} == FIGURES
    assert [ended["exit_code"] for ended in of(records, "exit")] == [0]
    (artifact,) = [one for one in of(records, "artifact") if one["type"] == "model"]
    assert "step_000020" in artifact["aliases"] and of(records, "alert") == []

    written = {path: path.stat().st_mtime_ns for path in folder.wandb.rglob("*")}
    head, *again = tracked(folder)
    assert head == f"{folder.title} · W&B has all of it already: {len(ROWS) + len(SAMPLES)} rows and 1 result of evaluations"
    assert again == ways and {path: path.stat().st_mtime_ns for path in folder.wandb.rglob("*")} == written


@pytest.mark.slow
def test_an_incomplete_record_is_replaced_and_keeps_its_id(folder: RunFolder) -> None:
    """The first one comes from a sweep, where W&B draws the id; then the run gets another row and a result."""
    tracked(folder, "--mode", "offline", WANDB_SWEEP_ID="abcd1234")
    drawn = read_json(folder.wandb_json)["id"]
    assert drawn != folder.title
    JsonLines(folder.metrics).write({"train/loss": 5.0, "progress/step": 30, "progress/tokens": 61440})
    evaluated(folder)
    assert tracked(folder)[0].endswith("rows and 1 result of evaluations · in place of an incomplete record")
    checkpoint(folder, 30)
    assert tracked(folder)[0].endswith("rows and 1 result of evaluations · in place of an incomplete record")
    assert tracked(folder)[0].endswith("W&B has all of it already: 7 rows and 1 result of evaluations")
    (offline,) = folder.wandb.glob(wandb_record.OFFLINE)
    assert offline.name.endswith(f"-{drawn}") and wandb_record.known(folder, FIGURES).complete
    assert {row["item"]["progress/step"] for row in of(inspected(folder), "history")} == {10, 20, 30}


@pytest.mark.slow
def test_online_it_is_written_to_the_server_once(folder: RunFolder) -> None:
    """Without samples: the server of the test answers too little for a table."""
    folder.samples.unlink()
    servers.Works.rows.clear()
    server = servers.serve(servers.Works)
    online = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server}
    head, *_ = tracked(folder, **online)
    assert head == f"{folder.title} · W&B online · {server}/somebody/tessera/runs/{folder.title} · {len(ROWS)} rows"
    assert [row["progress/step"] for row in servers.Works.rows] == [10, 20, 20]
    assert tracked(folder, **online)[0] == f"{folder.title} · W&B has all of it already: {len(ROWS)} rows"
    assert len(servers.Works.rows) == len(ROWS)


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes in which W&B runs are written, while none really is, and nothing is found in the files of W&B."""
    asked: list[str] = []

    def write(folder: RunFolder, description: object, mode: str, *_: object, **__: object) -> Opened:
        asked.append(mode)
        return Opened(mode, "as asked", SimpleNamespace(url="http://w/b"))

    monkeypatch.setattr(wandb_record, "write", write)
    monkeypatch.setattr(wandb_record, "inspect", lambda _: iter(()))
    return asked


def record(folder: RunFolder, name: str) -> Path:
    """An empty file of W&B."""
    file = folder.wandb / name / "run-a.wandb"
    file.parent.mkdir(parents=True)
    file.touch()
    return file


def test_an_incomplete_offline_record_is_replaced_by_an_online_run(folder: RunFolder, modes: list[str], capsys) -> None:
    record(folder, "offline-run-20260101_100000-a")
    track.main([str(folder.path), "--mode", "online"])
    assert modes == ["online"]
    head = f"{folder.title} · W&B online · http://w/b · {len(ROWS) + len(SAMPLES)} rows · in place of an incomplete record"
    assert capsys.readouterr().out.splitlines()[0] == head
    assert list(folder.wandb.glob("*")) == []


@pytest.mark.parametrize("sign", ["an online record", "wandb.json alone", "a record that was synced"])
def test_what_may_be_on_a_server_is_not_sent_there_again(sign: str, folder: RunFolder, modes: list[str], capsys) -> None:
    instead = ""
    if sign == "an online record":
        record(folder, "run-20260101_100000-a")
    elif sign == "wandb.json alone":  # as where RUN/wandb was removed to make room
        write_json(folder.wandb_json, {"id": "a", "project": "p", "entity": None, "mode": "online", "url": "http://w/b"})
    else:
        record(folder, "offline-run-20260101_100000-a").with_suffix(".wandb.synced").touch()
        instead = " · in place of an incomplete record"

    way_out = "leave --mode online out: then it is written to RUN/wandb"
    with pytest.raises(Mistake, match=f"rows of it may be on W&B's server already, and would be there twice → {way_out}"):
        track.main([str(folder.path), "--mode", "online"])
    track.main([str(folder.path)])
    why = "rows of it may be on W&B's server already"
    head = f"{folder.title} · W&B offline ({why}) · {len(ROWS) + len(SAMPLES)} rows{instead}"
    assert capsys.readouterr().out.splitlines()[0] == head and modes == ["offline"]


def test_what_cannot_be_tracked_is_refused_in_words(folder: RunFolder) -> None:
    write_json(folder.run, read_json(folder.run) | {"status": "running", "host": "another"})
    with pytest.raises(Mistake, match="is running and tells W&B itself what it logs → track it when it has ended"):
        track.main([str(folder.path)])
    folder.metrics.unlink()
    folder.samples.unlink()
    way_out = "track a run that has trained, or `evaluate` this one first"
    with pytest.raises(Mistake, match=f"has no rows in metrics.jsonl and no results of evaluations → {way_out}"):
        track.main([str(folder.path)])


@pytest.mark.slow
def test_imported_weights_that_were_evaluated_are_an_evaluation(folder: RunFolder) -> None:
    write_json(folder.run, read_json(folder.run) | {"status": run_folder.IMPORTED, "layout": "", "steps": 0})
    folder.metrics.unlink()
    folder.samples.unlink()
    evaluated(folder)
    assert tracked(folder)[0] == f"{folder.title} · W&B offline (no API key) · 1 result of evaluations"
    records = inspected(folder)
    (about,) = of(records, "run")
    assert (about["run_id"], about["job_type"], about["run_group"]) == (folder.title, "eval", "gpt")
    assert {name: value for record in of(records, "summary") for name, value in record["update"].items() if name in FIGURES} == FIGURES
    assert [ended["exit_code"] for ended in of(records, "exit")] == [0]
    assert tracked(folder)[0] == f"{folder.title} · W&B has all of it already: 1 result of evaluations"


def test_help_imports_neither_torch_nor_w_b() -> None:
    code = "import sys; from research.__main__ import main; sys.argv = ['', 'track', '--help']\ntry: main(sys.argv[1:])\n"
    code += "except SystemExit: print({'torch', 'wandb'} & {*sys.modules})"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.splitlines()[-1] == "set()" and "metrics.jsonl" in said and "wandb leet" in said


def test_a_run_that_is_in_use_is_not_tracked(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """By a launch that resumes it, before run.json says so; and no run is resumed while it is tracked."""
    lock = run_status.take_lock(folder)
    with pytest.raises(Held, match=f"{folder.title} is running .process {os.getpid()} on "):
        track.track(folder, "offline", Console())
    lock.release()
    lock = run_status.take_lock(folder, track.PURPOSE)
    with pytest.raises(Held, match=f"{folder.title} is in use by `python -m research track` .process {os.getpid()} on "):
        run_status.take_lock(folder)
    lock.release()
    assert capsys.readouterr().out == ""
