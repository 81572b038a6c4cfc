"""Run folders: made once, found by what a person types, their JSON never half written."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.checkpoint import folder as checkpoint_folder
from parallel.errors import Mistake
from parallel.files import read_json, write_json
from research.tracking import metrics, run_folder
from research.tracking.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    return started(tmp_path / "runs", "gpt_sotu")


def started(runs, name):
    folder = run_folder.create(runs, name)
    run_folder.start(folder, layout="pipe 1 × data 1 × tensor 2 · ZeRO-1", precision="fp32", steps=300)
    return folder


def test_a_new_folder_has_its_rooms_and_latest_points_at_it(tmp_path):
    first, second = run_folder.create(tmp_path, "a"), run_folder.create(tmp_path, "a")
    assert first.id != second.id and len(first.id) == 6 and int(first.id, 16) >= 0
    assert (first.name, first.title) == ("a", f"a-{first.id}")
    assert second.checkpoints.is_dir() and second.rank_log(3).parent.is_dir() and second.rank_log(3).name == "rank_3.txt"
    assert os.readlink(tmp_path / "a" / "latest") == second.id  # relative: runs/ may be moved
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted([first.id, second.id, "latest"])


def test_an_id_that_is_taken_is_drawn_again(tmp_path, monkeypatch):
    draws = iter(["aaaaaa", "aaaaaa", "bbbbbb"])
    monkeypatch.setattr(run_folder.secrets, "token_hex", lambda n: next(draws))
    assert [run_folder.create(tmp_path, "a").id for _ in range(2)] == ["aaaaaa", "bbbbbb"]


def point(folders, times):
    for _ in range(times):
        for folder in folders:
            run_folder.point_latest(folder)


def test_latest_is_never_missing_while_it_moves(tmp_path):
    folders = [run_folder.create(tmp_path, "a") for _ in range(2)]
    mover = multiprocessing.get_context("fork").Process(target=point, args=(folders, 2000))
    mover.start()
    seen = set()
    while mover.is_alive():
        seen.add(os.readlink(tmp_path / "a" / "latest"))
    assert mover.exitcode == 0 and seen == {folder.id for folder in folders}


def make_some(runs, n):
    for _ in range(n):
        run_folder.create(runs, "a")


def test_runs_that_start_at_once_have_folders_of_their_own(tmp_path):
    workers = [multiprocessing.get_context("fork").Process(target=make_some, args=(tmp_path, 20)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len([path for path in (tmp_path / "a").iterdir() if not path.is_symlink()]) == 40


def test_runs_that_cannot_be_written_are_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Mistake, match="track.runs"):
        run_folder.create(tmp_path / "file", "a")
    (tmp_path / "a").write_text("")
    with pytest.raises(Mistake, match="track.runs.*Not a directory"):
        run_folder.create(tmp_path, "a")


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"text": "é ▸", "n": 1})
    before = path.read_bytes()
    assert json.loads(before) == {"text": "é ▸", "n": 1} and "é ▸" in before.decode()
    for bad in ({"n": float("nan")}, {"n": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, bad)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_half_a_json(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"n": 0})
    writer = multiprocessing.get_context("fork").Process(target=lambda: [write_json(path, {"n": i} | BIG) for i in range(60)])
    writer.start()
    reads = 0
    while writer.is_alive():
        read_json(path)
        reads += 1
    assert writer.exitcode == 0 and reads > 0 and read_json(path)["n"] == 59


BIG = {str(i): "x" * 100 for i in range(500)}


def test_the_status_of_a_run(folder):
    assert run_folder.status(read_json(folder.run)) == "running"
    run_folder.end(folder, run_folder.INTERRUPTED)
    run = read_json(folder.run)
    assert run_folder.status(run) == "interrupted" and run["started"] <= run["ended"] and run["steps"] == 300


def test_why_a_run_ended_is_said_until_it_is_finished(folder):
    run_folder.end(folder, run_folder.FAILED, "rank 1 is gone")
    run_folder.end_unless_ended(folder, run_folder.INTERRUPTED, "another rank's word, too late")
    run = read_json(folder.run)
    assert (run["status"], run["reason"]) == ("failed", "rank 1 is gone")
    run_folder.end(folder, run_folder.FINISHED, "a signal after the last step")
    assert "reason" not in read_json(folder.run)


def test_a_running_run_whose_process_is_gone_has_died(folder):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run = read_json(folder.run) | {"pid": gone.pid}
    assert run_folder.status(run) == "died"
    assert run_folder.status(run | {"host": socket.gethostname() + "-other"}) == "running"  # another machine's processes cannot be seen
    assert run_folder.status({}) == "unknown"


@pytest.mark.parametrize("variant", [True, False])
def test_the_source_is_kept_with_digests_that_sha256sum_accepts(folder, tmp_path, variant):
    experiment = tmp_path / "experiment"
    experiment.mkdir()
    (experiment / "config.py").write_text("config = 'é'\n")
    (experiment / "notes.txt").write_text("not kept")
    if variant:
        (experiment / "variant.py").write_text("class MyNorm: ...\n")
    sums = run_folder.keep_source(folder, experiment)
    assert list(sums) == ["config.py", "variant.py"][: 1 + variant]
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder.source, capture_output=True).returncode == 0
    (folder.source / "config.py").write_text("edited")
    assert subprocess.run(check, cwd=folder.source, capture_output=True).returncode != 0


def test_a_run_is_found_by_whatever_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    first, second = started(runs, "gpt-a"), started(runs, "gpt-a")
    for handle in ("runs/gpt-a/latest", "runs/gpt-a/latest/", "runs/gpt-a", "gpt-a", "gpt-a/latest", str(second.path), second.title):
        assert run_folder.find(handle) == second, handle
    for handle in (first.title, f"gpt-a/{first.id}", f"runs/gpt-a/{first.id}"):
        assert run_folder.find(handle) == first, handle
    assert run_folder.find("gpt-a", runs=runs).path == second.path
    assert [folder.id for folder in run_folder.every(runs)] == sorted([first.id, second.id])


def test_a_run_that_is_not_there_lists_those_that_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Mistake, match="no run folder nope → runs holds no run yet"):
        run_folder.find("nope")
    made = [started(tmp_path / "runs", "a") for _ in range(7)]
    run_folder.create(tmp_path / "runs", "unstarted")
    with pytest.raises(Mistake, match="there are runs/a/.* or 2 more") as refused:
        run_folder.find("a-nope")
    assert sum(folder.id in str(refused.value) for folder in made) == 5
    with pytest.raises(Mistake):
        run_folder.find("runs/unstarted/latest")


def test_a_handle_names_a_checkpoint_or_a_run_with_its_newest_one(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (5, 10):
        checkpoint = folder.checkpoints / f"step_{step:06d}"
        checkpoint.mkdir()
        (checkpoint / "manifest.json").write_text("{}")
        checkpoint_folder.point_latest(checkpoint)
    for handle in ("gpt_sotu", folder.title, "runs/gpt_sotu/latest/checkpoints/step_000010"):
        assert run_folder.find_checkpoint(handle) == (folder, folder.checkpoints / "step_000010"), handle
    named = f"runs/gpt_sotu/{folder.id}/checkpoints/step_000005"
    assert run_folder.find_checkpoint(named) == (folder, folder.checkpoints / "step_000005")
    with pytest.raises(Mistake, match="is a checkpoint outside of a run's folder → name one in runs/NAME/ID/checkpoints"):
        run_folder.find_checkpoint(named, needs="config.json")
    with pytest.raises(Mistake, match="there is no run folder nope"):
        run_folder.find_checkpoint("nope", tmp_path / "runs")


def test_making_the_object_touches_no_disk(tmp_path):
    assert RunFolder(tmp_path / "a" / "0a1b2c").metrics == tmp_path / "a" / "0a1b2c" / "metrics.jsonl"
    assert not (tmp_path / "a").exists()


def with_rows(tmp_path: Path) -> RunFolder:
    made = run_folder.create(tmp_path, "x")
    run_folder.start(made, layout="pp1", precision="fp32", steps=9)
    rows = [json.dumps({"progress/step": step, "train/loss": 0.1 * step}) for step in (1, 2, 3, 4)]
    made.metrics.write_text("\n".join(rows) + '\n{"progress/step": 5, "trai')
    made.samples.write_text(json.dumps({"progress/step": 2, "text": "a"}) + "\n")
    return made


def test_rows_after_the_checkpoint_leave_and_are_kept(tmp_path: Path) -> None:
    made = with_rows(tmp_path)
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
    made = with_rows(tmp_path)
    made.metrics.write_text(
        metrics.encode({"progress/step": 1, "train/loss": float("nan")}) + "\n" + json.dumps({"progress/step": 9}) + "\n"
    )
    run_folder.reopen(made, 1, {})
    (row,) = metrics.read(made.metrics)
    assert row["train/loss"] != row["train/loss"]
