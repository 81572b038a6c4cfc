"""Which run and checkpoint `--resume` finds: the newest that matches, none that is running, a whole checkpoint, and its lock."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.errors import Damaged, Mistake
from parallel.files import read_json, write_json
from research.cluster.exit_codes import DAMAGED
from research.config import serialization
from research.tracking import acquire_lock, run_folder, run_status
from research.tracking.acquire_lock import is_held, release
from research.tracking.run_folder import FAILED, FINISHED, INTERRUPTED, RUNNING, RunFolder
from research.tracking.run_lock import RunLock
from research.training.resume import AUTO, find
from tests.parallel.helpers.checkpoints import save
from tests.research.helpers.example import example, sentence


def made(runs: Path, status: str = INTERRUPTED, **settings) -> RunFolder:
    """A run of `mine` with a checkpoint after step 1 that has ended like this."""
    folder = run_folder.create(runs, "mine")
    experiment = example(**settings)
    serialization.save(experiment, folder.config)
    save(folder.checkpoints / "step_000001")
    run_folder.start(folder, layout="", precision="fp32", steps=2)
    if status != RUNNING:
        run_folder.end(folder, status)
    return folder


def auto(runs: Path, **settings) -> tuple[RunFolder | None, str]:
    locks = list[RunLock]()
    found, why = find(AUTO, example(**settings), Path("mine"), runs, locks)
    assert len(locks) == 1
    locks.pop().release()
    return (found.folder if found else None), why


def test_an_unfinished_run_is_found_behind_a_finished_one_with_another_seed(tmp_path: Path) -> None:
    first, second = made(tmp_path, seed=1), made(tmp_path, FINISHED, seed=2)
    assert auto(tmp_path, seed=1) == (first, "")
    assert auto(tmp_path, seed=2) == (None, f"a new run: {second.title}, which has these settings, is finished")


def test_what_is_no_science_may_differ(tmp_path: Path) -> None:
    """Another length, layout and place of the cache; the newest of two that match is taken, and said."""
    older, newer = made(tmp_path, schedule={"steps": 600}), made(tmp_path, FAILED, parallel={"tensor": 2})
    made(tmp_path, seed=7)
    run_folder.create(tmp_path, "mine")  # begun, and killed at once
    assert auto(tmp_path) == (newer, f"{newer.title} is the newest unfinished run with these settings; older: {older.title}")


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        ({"optimizer": {"lr": 1.0}}, "optimizer.lr 0.003 → 1.0"),
        ({"init_from": "b"}, "init_from None → b"),
        ({"schedule": {"length_ramp": (64, 64, 100)}}, "schedule.length_ramp None → [64, 64, 100]"),
        ({"optimizer": {"lr": 1.0}, "seed": 3}, "optimizer.lr 0.003 → 1.0, seed 1 → 3"),
    ],
)
def test_a_new_run_begins_where_none_matches_and_the_nearest_is_named(tmp_path: Path, settings: dict, differs: str) -> None:
    nearest = made(tmp_path)
    made(tmp_path, model={"num_layers": 6}, optimizer={"eps": 1e-7}, seed=9)
    none, why = auto(tmp_path, **settings)
    assert none is None
    assert why == f"a new run: no unfinished run has these settings; {nearest.title} is nearest, with {differs}"


def test_another_variant_is_another_experiment(tmp_path: Path) -> None:
    mine, source = {"model": {"norm": "variant:Mine"}}, tmp_path / "experiments" / "mine"
    source.mkdir(parents=True)
    (source / "config.py").write_text("")
    (source / "variant.py").write_text("class Mine: ...")
    folder = made(tmp_path, **mine)
    run_folder.keep_source(folder, source)
    found, _ = find(AUTO, example(**mine), source, tmp_path)
    assert found is not None and found.folder == folder
    (source / "variant.py").write_text("class Mine: pass")
    found, why = find(AUTO, example(**mine), source, tmp_path)
    assert found is None and f"{folder.title} is nearest, with variant.py " in why


def test_a_run_that_cannot_be_read_keeps_no_other_from_being_found(tmp_path: Path) -> None:
    damaged, other = made(tmp_path), made(tmp_path, seed=5)
    damaged.config.write_text("{")
    assert auto(tmp_path, seed=5) == (other, "")
    assert auto(tmp_path)[1].endswith(f"; {damaged.title} cannot be read")


# A run that is running, or says so.


def beats(folder: RunFolder) -> contextlib.AbstractContextManager[None]:
    """Its ranks write heartbeats meanwhile, on whatever machine."""

    @contextlib.contextmanager
    def beating() -> Iterator[None]:
        over = threading.Event()

        def write() -> None:
            beat = 0
            while not over.wait(0.02):
                beat += 1
                folder.heartbeat(1).write_text(f'{{"beat": {beat}}}')

        thread = threading.Thread(target=write)
        thread.start()
        yield
        over.set()
        thread.join()

    return beating()


def test_a_run_that_is_running_is_refused_with_its_process_and_since_when(tmp_path: Path) -> None:
    folder = made(tmp_path, RUNNING)
    run = read_json(folder.run)
    said = f"{folder.title} is running (process {os.getpid()} on {run['host']}, since {run['started']}) → wait for its end, or end it: "
    for handle in (AUTO, folder.title):
        assert sentence(lambda: find(handle, example(), Path("mine"), tmp_path)) == f"{said}kill -USR1 {os.getpid()}"  # noqa: B023


def test_a_strangers_process_with_the_number_is_not_the_run(tmp_path: Path) -> None:
    """The run was killed, and its number is now this process's."""
    folder = made(tmp_path, RUNNING)
    run = read_json(folder.run)
    write_json(folder.run, run | {"started_after_boot": run["started_after_boot"] - 100})
    assert auto(tmp_path) == (folder, "")


ELSEWHERE = [{"boot_id": "another", "host": "node7"}, {"pid_namespace": "pid:[1]", "host": "node7"}, {"boot_id": None, "host": "node7"}]
"""On another machine, in another container, and in a run.json of an older version, which had host and pid only."""


@pytest.mark.parametrize("elsewhere", [ELSEWHERE[0], *(pytest.param(each, marks=pytest.mark.slow) for each in ELSEWHERE[1:])])
def test_a_process_out_of_sight_is_known_by_its_heartbeat(
    tmp_path: Path, elsewhere: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed as process 1 of its container, it can be resumed; while it lives, it is refused, whatever process 1 is here."""
    monkeypatch.setattr(acquire_lock, "WATCH_SECONDS", 0.5)
    monkeypatch.setattr(acquire_lock, "SETTLE_SECONDS", 0.0)
    folder = made(tmp_path, RUNNING)
    run = read_json(folder.run) | elsewhere | {"pid": 1}
    write_json(folder.run, {key: value for key, value in run.items() if value is not None})
    folder.heartbeat(0).write_text("{}")
    who = f"process 1 on node7, since {run['started']}"
    with beats(folder):
        said = sentence(lambda: find(AUTO, example(), Path("mine"), tmp_path, []))
    end = "it cannot be seen from here, but its heartbeat goes on → wait for its end, or end it there: kill -USR1 1"
    assert said == f"{folder.title} is running ({who}): {end}"
    capsys.readouterr()
    found, _ = find(AUTO, example(), Path("mine"), tmp_path)
    assert found and found.folder == folder and not folder.lock.exists()
    assert capsys.readouterr().err.endswith(": a dry run does not watch its heartbeat\n")
    assert auto(tmp_path) == (folder, "")
    assert capsys.readouterr() == ("", f"resume   {folder.title} may be in use by {who}: its heartbeat is watched for 0 s …\n")


# The locks that `find` takes.


def test_a_run_is_locked_from_finding_it_on(tmp_path: Path) -> None:
    folder, locks = made(tmp_path), list[RunLock]()
    find(AUTO, example(), Path("mine"), tmp_path, locks)
    assert [lock.place for lock in locks] == [folder.lock] and is_held(folder.lock)
    who = f"process {os.getpid()} on {read_json(folder.run)['host']}, since "
    for handle in (AUTO, folder.title, str(folder.checkpoints / "step_000001")):
        assert f"{folder.title} is running ({who}" in sentence(lambda: find(handle, example(), Path("mine"), tmp_path, []))  # noqa: B023
    release(locks)
    assert auto(tmp_path) == (folder, "")
    assert not [path for path in (tmp_path / "mine").iterdir() if path.name.startswith(".starting")]


def test_a_run_that_is_refused_is_not_locked(tmp_path: Path) -> None:
    folder, locks = made(tmp_path, FINISHED, schedule={"steps": 1}), list[RunLock]()
    with pytest.raises(Mistake, match="has taken all of its"):
        find(folder.title, example(schedule={"steps": 1}), Path("mine"), tmp_path, locks)
    assert not is_held(folder.lock)


def test_no_new_run_begins_beside_a_running_one_with_these_settings(tmp_path: Path) -> None:
    """It has no checkpoint yet. With another seed it is another run; once it has died, a new one begins."""
    made(tmp_path, seed=7)
    folder = made(tmp_path, RUNNING)
    shutil.rmtree(folder.checkpoints)
    lock = run_status.take_lock(folder)
    assert f"{folder.title} is running (process {os.getpid()} on " in sentence(lambda: find(AUTO, example(), Path("mine"), tmp_path, []))
    assert auto(tmp_path, seed=3)[0] is None
    lock.release()
    assert auto(tmp_path)[0] is None


def test_of_two_that_begin_the_same_run_at_once_one_is_refused(tmp_path: Path) -> None:
    """Both find nothing to resume. Another seed is another run; what may change on a resume is the same one."""
    locks = list[RunLock]()
    assert find(AUTO, example(), Path("mine"), tmp_path, locks)[0] is None and len(locks) == 1
    said = sentence(lambda: find(AUTO, example(schedule={"steps": 7}), Path("mine"), tmp_path, []))
    assert said.startswith("a run of mine with these settings is in use by `--resume auto` (process ") and str(os.getpid()) in said
    others = list[RunLock]()
    find(AUTO, example(seed=3), Path("mine"), tmp_path, others)
    release(others)
    release(locks)
    find(AUTO, example(), Path("mine"), tmp_path, locks)
    locks.pop().release()


def test_a_run_that_its_holder_has_finished_meanwhile_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was unfinished when it was found, and finished when its lock was free."""
    folder = made(tmp_path)
    take_lock = run_status.take_lock

    def after_its_end(*arguments: object, **more: object) -> RunLock:
        run_folder.end(folder, FINISHED)
        return take_lock(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(run_status, "take_lock", after_its_end)
    locks = list[RunLock]()
    found, why = find(AUTO, example(), Path("mine"), tmp_path, locks)
    assert found is None and why == f"a new run: {folder.title}, which has these settings, is finished"
    assert [lock.place.name[:10] for lock in locks] == [".starting-"]
    release(locks)


# Damaged checkpoints.


def damage(checkpoint: Path, how: str) -> None:
    file = sorted(checkpoint.glob("*.safetensors"))[0]
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "missing":
        file.unlink()
    elif how == "empty manifest":
        (checkpoint / "manifest.json").write_text("")
    else:
        text = (checkpoint / "manifest.json").read_text()
        (checkpoint / "manifest.json").write_text(text.replace('"step": 2', '"step": 3'))


@pytest.mark.parametrize("how", ["truncated", "missing", "empty manifest", "flipped manifest"])
def test_auto_falls_back_to_the_newest_whole_checkpoint_and_a_path_does_not(tmp_path: Path, how: str) -> None:
    folder = made(tmp_path)
    newest = folder.checkpoints / "step_000002"
    save(newest, step=2)
    damage(newest, how)
    found, _ = find(AUTO, example(), Path("mine"), tmp_path)
    assert found and found.checkpoint == folder.checkpoints / "step_000001" and found.step == 1
    assert list(found.passed_over) == ["step_000002"] and str(newest) in found.passed_over["step_000002"]
    for handle in (folder.title, str(newest)):
        with pytest.raises(Damaged, match="step_000001, the newest whole one, or --resume auto") as refused:
            find(handle, example(), Path("mine"), tmp_path)
        assert str(newest) in str(refused.value) and refused.value.code == DAMAGED
    damage(folder.checkpoints / "step_000001", how)
    if how != "flipped manifest":
        with pytest.raises(Damaged, match=f"{folder.title} has no whole checkpoint: .*step_000002.*; .*step_000001"):
            find(AUTO, example(), Path("mine"), tmp_path)


def test_a_checkpoint_after_the_latest_is_of_another_future(tmp_path: Path) -> None:
    """The run was resumed from step 1 on purpose, and has saved step 3 since; step 9 was before that."""
    folder = made(tmp_path)
    for step in (9, 3):
        save(folder.checkpoints / f"step_{step:06d}", step=step)
    damage(folder.checkpoints / "step_000003", "missing")
    found, _ = find(AUTO, example(), Path("mine"), tmp_path)
    assert found and found.step == 1
