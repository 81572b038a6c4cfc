"""The status of a run, known by its lock, its process or its heartbeats, and which of several runs a name means."""

import os
import shutil
import time

import pytest

from parallel.files import read_json, write_json
from research.tracking import lock_record, run_folder, run_status
from tests.research.tracking.test_run_folder import gone, save, started


@pytest.fixture
def folder(tmp_path):
    return started(tmp_path / "runs", "gpt_sotu")


def test_the_status_of_a_run(folder):
    assert run_status.status(read_json(folder.run), folder) == "running"
    run_folder.end(folder, run_folder.INTERRUPTED)
    run = read_json(folder.run)
    assert run_status.status(run, folder) == "interrupted" and run["started"] <= run["ended"] and run["steps"] == 300


def test_a_running_run_whose_process_has_ended_has_died(folder):
    """A run of an older version, which has no lock."""
    write_json(folder.run, read_json(folder.run) | gone())
    assert run_status.status(read_json(folder.run), folder) == "died"
    run = read_json(folder.run) | run_folder.owner()
    write_json(folder.run, run | {"started_after_boot": run["started_after_boot"] - 100})  # the number is a stranger's now
    assert run_status.status(read_json(folder.run), folder) == "died"
    assert run_status.status({}, folder) == "unknown"


def test_a_running_run_is_known_by_its_lock(folder):
    """run.json may name a process that has ended, and the lock another one that lives, or the other way round."""
    lock = run_status.take_lock(folder) if write_json(folder.run, read_json(folder.run) | gone()) is None else None
    assert run_status.status(read_json(folder.run), folder) == "running"
    write_json(folder.run, read_json(folder.run) | run_folder.owner())
    lock.release()
    assert run_status.status(read_json(folder.run), folder) == "died"


@pytest.mark.parametrize("elsewhere", [{"boot_id": "another"}, {"pid_namespace": "pid:[1]"}, {"started_after_boot": None}])
def test_a_run_whose_process_cannot_be_seen_has_died_if_its_heartbeat_does_not_change(folder, elsewhere, monkeypatch):
    """On another machine, in another container, or begun by an older version, which wrote host and pid only."""
    monkeypatch.setattr(run_status, "STATUS_WATCH_SECONDS", 0.2)
    write_json(folder.run, read_json(folder.run) | elsewhere)
    heartbeat, beats, sleep = folder.heartbeat(1), iter(range(1000)), time.sleep
    heartbeat.write_text("{}")
    os.utime(heartbeat)  # how new the file is says nothing
    assert run_status.status(read_json(folder.run), folder) == "died"
    monkeypatch.setattr(lock_record.time, "sleep", lambda seconds: (heartbeat.write_text(f"{next(beats)}"), sleep(seconds / 10)))
    assert run_status.status(read_json(folder.run), folder) == "running"


def test_runs_out_of_sight_are_listened_to_at_the_same_time(tmp_path, monkeypatch):
    runs = [started(tmp_path, "a") for _ in range(8)]
    for one in runs:
        write_json(one.run, read_json(one.run) | {"boot_id": "another"})
    slept = []
    monkeypatch.setattr(run_status, "STATUS_WATCH_SECONDS", 0.2)
    monkeypatch.setattr(lock_record.time, "sleep", lambda seconds: slept.append(seconds) or sleep_(seconds))
    assert run_status.statuses([(read_json(one.run), one) for one in runs]) == ["died"] * 8
    assert sum(slept) < 0.5


sleep_ = time.sleep


@pytest.mark.parametrize("handle", ["gpt_sotu", "runs/gpt_sotu", "runs/gpt_sotu/latest", "gpt_sotu/latest"])
def test_a_name_means_the_newest_run_with_a_checkpoint_and_which_is_said(folder, tmp_path, monkeypatch, handle):
    """Whatever the link says: a version before this one let it point to runs that failed before their first step."""
    monkeypatch.chdir(tmp_path)
    assert run_status.choice(handle, folder) == f"{handle} is {folder.title}, the newest run; none has a checkpoint"
    save(folder)
    assert run_status.choice(handle, folder) == f"{handle} is {folder.title}, the newest run with a checkpoint"
    failed, under_way = (started(tmp_path / "runs", "gpt_sotu") for _ in range(2))
    run_folder.end(failed, run_folder.FAILED, "no text")
    os.utime(under_way.run)
    (tmp_path / "runs/gpt_sotu/latest").unlink()
    (tmp_path / "runs/gpt_sotu/latest").symlink_to(failed.id)
    assert run_folder.find(handle) == folder and run_folder.find_checkpoint(handle) == (folder, folder.checkpoints / "step_000003")
    said = run_status.choice(handle, folder)
    newer = said.removeprefix(f"{handle} is {folder.title}, the newest run with a checkpoint; ").removesuffix(" are newer and have none")
    # Both may have started in the same second.
    assert sorted(newer.split(", ")) == sorted([f"{failed.title} (failed)", f"{under_way.title} (running)"])


def test_nothing_is_said_of_a_run_that_is_named_itself(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(folder)
    checkpoint = f"runs/gpt_sotu/{folder.id}/checkpoints/step_000003"
    for handle in (folder.title, str(folder.path), f"runs/gpt_sotu/{folder.id}/", f"gpt_sotu/{folder.id}", checkpoint):
        assert run_status.choice(handle, folder) == "", handle
    (tmp_path / "best").symlink_to(folder.path)
    shutil.copytree(folder.path, tmp_path / "copy" / "latest")  # scp -r of the link
    for handle in ("best", "copy/latest"):
        assert run_status.choice(handle, run_folder.find(handle)) == "" and run_folder.find(handle).id in (folder.id, "latest")
    monkeypatch.chdir(folder.path)
    assert run_folder.find(".") == folder and run_status.choice(".", folder) == ""
