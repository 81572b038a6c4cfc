"""Which run a launch has made or gone on with, and what the next launch is given, read off files alone."""

import json
from pathlib import Path

import pytest

from research import run_folder
from research.record import Record, saved_step
from research.run_folder import RunFolder


def run(runs: Path, name: str = "gpt") -> RunFolder:
    folder = run_folder.create(runs, name)
    run_folder.start(folder, layout="", precision="", steps=9)
    return folder


def save(folder: RunFolder, step: int) -> None:
    checkpoint = folder.checkpoints / f"step_{step:06d}"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text(json.dumps({"step": step}))
    (folder.checkpoints / "latest").write_text(checkpoint.name)


def test_a_launch_that_made_nothing_has_no_run(tmp_path: Path) -> None:
    save(run(tmp_path), 5)
    record = Record(tmp_path / "gpt")
    record.begin()
    assert not record.end() and record.run is None and record.state() == ("", "")
    assert record.settings(["--seed", "3"]) == ["--seed", "3"]
    nowhere = Record(tmp_path / "none")
    nowhere.begin()
    assert not nowhere.end()


def test_only_a_newer_checkpoint_than_before_is_progress(tmp_path: Path) -> None:
    record, folder = Record(tmp_path / "gpt"), run(tmp_path)
    save(folder, 5)
    found = []
    for step in (None, 7, None, 9):
        record.begin()
        run_folder.end(folder, run_folder.FAILED, f"crash before {step}")
        if step:
            save(folder, step)
        found.append((record.end(), record.last))
        assert record.run == folder and record.state() == ("failed", f"crash before {step}")
    assert found == [(False, 5), (True, 7), (False, 7), (True, 9)]


def test_runs_that_begin_anew_and_get_no_further_are_no_progress(tmp_path: Path) -> None:
    record, found = Record(tmp_path / "gpt"), []
    for step in (3, 3, 4):
        record.begin()
        save(run(tmp_path), step)
        found.append(record.end())
    assert found == [True, False, True]


@pytest.mark.parametrize("given", [["--resume", "never", "--seed", "3"], ["--resume=runs/x", "--seed", "3"], ["--seed", "3"]])
def test_the_next_launch_goes_on_from_the_checkpoint(given: list[str], tmp_path: Path) -> None:
    record = Record(tmp_path / "gpt")
    record.begin()
    mine = run(tmp_path)
    record.end()
    assert record.settings(given) == given
    save(mine, 2)
    record.end()
    assert record.settings(given) == ["--seed", "3", "--resume", "auto"]
    run(tmp_path)  # somebody else's
    assert record.settings(given) == ["--seed", "3", "--resume", str(mine.path)]


@pytest.mark.parametrize("text", ["", "{}", '{"step": null}', "nonsense"])
def test_a_damaged_checkpoint_is_none(text: str, tmp_path: Path) -> None:
    folder = run(tmp_path)
    assert saved_step(folder) == -1
    save(folder, 2)
    assert saved_step(folder) == 2
    (folder.checkpoints / "step_000002/manifest.json").write_text(text)
    assert saved_step(folder) == -1
