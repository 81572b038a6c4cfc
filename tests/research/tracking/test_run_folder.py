"""Run folders: made once, found by what a person types, their JSON never half written."""

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from parallel.checkpoint import folder as checkpoint_folder
from parallel.errors import Mistake
from parallel.files import read_json, write_json
from parallel.process_identity import ProcessIdentity
from research.tracking import metrics, run_folder, run_status, segments
from research.tracking.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    return started(tmp_path / "runs", "gpt_sotu")


def started(runs, name):
    folder = run_folder.create(runs, name)
    run_folder.start(folder, layout="pipe 1 × data 1 × tensor 2 · ZeRO-1", precision="fp32", steps=300)
    return folder


def save(folder, step=3):
    """Something that looks like a complete checkpoint."""
    checkpoint = folder.checkpoints / f"step_{step:06d}"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    checkpoint_folder.point_latest(checkpoint)


def latest(folder):
    return os.readlink(folder.path.parent / "latest")


def test_a_new_folder_has_its_rooms(tmp_path):
    first, second = run_folder.create(tmp_path, "a"), run_folder.create(tmp_path, "a")
    assert first.id != second.id and len(first.id) == 6 and int(first.id, 16) >= 0
    assert (first.name, first.title) == ("a", f"a-{first.id}")
    assert second.checkpoints.is_dir() and second.rank_log(3).parent.is_dir() and second.rank_log(3).name == "rank_3.txt"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted([first.id, second.id])


def test_latest_is_the_newest_run_with_a_checkpoint_and_until_there_is_one_the_newest(tmp_path):
    first, second, third = (started(tmp_path, "a") for _ in range(3))
    assert latest(third) == third.id  # relative: runs/ may be moved
    for saved in (first, second):
        save(saved)
        run_folder.point_latest(tmp_path / "a")
        assert latest(saved) == saved.id
    save(first, 6)  # the older run goes on
    run_folder.point_latest(tmp_path / "a")
    assert latest(first) == second.id and latest(started(tmp_path, "a")) == second.id


def test_a_run_that_was_refused_leaves_nothing(tmp_path):
    first = started(tmp_path, "a")
    run_folder.discard(first)
    assert list(tmp_path.iterdir()) == []
    first, second = started(tmp_path, "a"), started(tmp_path, "a")
    held = second.rank_log(0).open("w")  # as its logger does
    run_folder.discard(second)
    held.close()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted([first.id, "latest"]) and latest(first) == first.id
    run_folder.end_unless_ended(second, run_folder.FAILED, "said by another rank, too late", ProcessIdentity.current())
    assert not second.path.exists()


def test_an_id_that_is_taken_is_drawn_again(tmp_path, monkeypatch):
    draws = iter(["aaaaaa", "aaaaaa", "bbbbbb"])
    monkeypatch.setattr(run_folder.secrets, "token_hex", lambda n: next(draws))
    assert [run_folder.create(tmp_path, "a").id for _ in range(2)] == ["aaaaaa", "bbbbbb"]


def point(folders, times):
    for _ in range(times):
        for folder in folders:
            os.utime(folder.run)  # of runs that started in one second, this one is the newest now
            run_folder.point_latest(folder.path.parent)


def test_latest_is_never_missing_while_it_moves(tmp_path):
    folders = [started(tmp_path, "a") for _ in range(2)]
    for folder in folders:
        write_json(folder.run, read_json(folder.run) | {"started": "2026-01-31T12:00:00+00:00"})
    mover = multiprocessing.get_context("fork").Process(target=point, args=(folders, 150))
    mover.start()
    seen = set()
    while mover.is_alive():
        seen.add(latest(folders[0]))
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


def test_why_a_run_ended_is_said_until_it_is_finished(folder):
    run_folder.end(folder, run_folder.FAILED, "rank 1 is gone")
    run_folder.end_unless_ended(folder, run_folder.INTERRUPTED, "another rank's word, too late", ProcessIdentity.current())
    run = read_json(folder.run)
    assert (run["status"], run["reason"]) == ("failed", "rank 1 is gone")
    run_folder.end(folder, run_folder.FINISHED, "a signal after the last step")
    assert "reason" not in read_json(folder.run)


def gone() -> dict:
    """A process of this machine that has ended, as run.json names it."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    named = asdict(ProcessIdentity.of(psutil.Process(process.pid)))
    process.kill()
    process.wait()
    return named


def test_the_end_of_a_run_is_read_from_its_lock_where_run_json_could_not_be_written(folder, monkeypatch):
    lock = run_status.take_lock(folder)

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "write_json", full)
        run_folder.end_or_keep(folder, lock, run_folder.FAILED, "metrics.jsonl cannot be written", 4)
    lock.release()
    assert read_json(folder.run)["status"] == "running"
    run = run_folder.read_run(folder)
    assert (run["status"], run["reason"], run["code"]) == ("failed", "metrics.jsonl cannot be written", 4)
    assert run_status.status(run, folder) == "failed"
    take_again = run_status.take_lock(folder)  # the next launch
    assert run_folder.read_run(folder)["status"] == "running"
    take_again.release()


def test_a_rank_that_outlives_rank_0_writes_the_end_unless_another_launch_goes_on(folder):
    """The other launch's rank 0 is this process; the dead one had the run before it."""
    dead = ProcessIdentity.from_json(gone())
    write_json(folder.run, read_json(folder.run) | asdict(dead))
    run_folder.end_unless_ended(folder, run_folder.FAILED, "rank 0 is gone", dead)
    assert read_json(folder.run)["reason"] == "rank 0 is gone"
    lock = run_status.take_lock(folder)
    segments.reopen(folder, 0, {})
    run_folder.end_unless_ended(folder, run_folder.FAILED, "rank 0 is gone", dead)
    assert read_json(folder.run)["status"] == "running" and "reason" not in read_json(folder.run)
    write_json(folder.run, read_json(folder.run) | asdict(dead))  # between its lock and its first word in run.json
    run_folder.end_unless_ended(folder, run_folder.FAILED, "rank 0 is gone", dead)
    assert read_json(folder.run)["status"] == "running"
    lock.release()


def test_a_half_line_goes_at_a_resume_and_takes_no_row_along(tmp_path):
    made = with_rows(tmp_path)
    segments.reopen(made, 4, {})
    assert made.metrics.read_bytes().endswith(b"\n") and [row["progress/step"] for row in metrics.read(made.metrics)] == [1, 2, 3, 4]
    assert made.metrics.read_bytes().count(b"\n") == 4 and not (made.path / "dropped.jsonl").exists()


def test_a_segment_that_falls_back_begins_at_the_older_checkpoint(tmp_path):
    made = with_rows(tmp_path)
    segments.reopen(made, 3, {"checkpoint": "step_000003", "passed_over": {"step_000004": "is damaged"}})
    segments.rewind(made, 2, "step_000002", {"step_000003": "is damaged too"})
    segment = read_json(made.run)["segments"][-1]
    assert (segment["from_step"], segment["checkpoint"]) == (2, "step_000002")
    assert segment["passed_over"] == {"step_000004": "is damaged", "step_000003": "is damaged too"}
    assert [row["progress/step"] for row in metrics.read(made.metrics)] == [1, 2]
    assert [row["progress/step"] for row in metrics.read(made.path / "dropped.jsonl")] == [4, 3]


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
    for handle in ("runs/unstarted/latest", "a whole prompt " * 100, "", "/", "nothing\0"):
        with pytest.raises(Mistake, match="there is no run folder"):
            run_folder.find_checkpoint(handle)


def test_a_copy_of_the_link_is_left_alone_and_is_no_run_of_its_own(folder):
    copy = folder.path.parent / "latest"
    copy.unlink()
    shutil.copytree(folder.path, copy)
    second = started(folder.path.parent.parent, folder.name)
    assert copy.is_dir() and not copy.is_symlink()
    assert {run.id for run in run_folder.every(folder.path.parent.parent)} == {folder.id, second.id}


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
    segment = {"layout": "pp2", "steps": 12, "commit": "0a1b2c", "dirty": True}
    assert segments.reopen(made, 2, segment) == 2
    assert [row["progress/step"] for row in metrics.read(made.metrics)] == [1, 2]
    assert made.metrics.read_text().splitlines()[-1] == json.dumps({"progress/step": 2, "train/loss": 0.2})  # the torn line is gone
    kept = list(metrics.read(made.path / "dropped.jsonl"))
    assert [(row["segment"], row["file"], row["progress/step"], row["train/loss"]) for row in kept] == [
        (2, "metrics.jsonl", 3, 0.1 * 3),
        (2, "metrics.jsonl", 4, 0.1 * 4),
    ]
    run = read_json(made.run)
    assert (run["status"], run["layout"], run["steps"], run["precision"]) == ("running", "pp2", 12, "fp32")
    assert (run["commit"], run["dirty"]) == ("0a1b2c", True)  # of the code that runs now
    assert [segment["from_step"] for segment in run["segments"]] == [0, 2]
    assert segments.reopen(made, 2, {}) == 3 and len(list(metrics.read(made.path / "dropped.jsonl"))) == 2


def test_a_number_that_json_has_not_survives_the_cut(tmp_path: Path) -> None:
    made = with_rows(tmp_path)
    made.metrics.write_text(
        metrics.encode({"progress/step": 1, "train/loss": float("nan")}) + "\n" + json.dumps({"progress/step": 9}) + "\n"
    )
    segments.reopen(made, 1, {})
    (row,) = metrics.read(made.metrics)
    assert row["train/loss"] != row["train/loss"]
