"""Progress and heartbeats: what a rank writes is what the others read, and silence is counted by the reader."""

import sys
import threading
from pathlib import Path

import pytest

from research import ROOT
from research.reliability.heartbeat import Heartbeats, Progress, Stage, stack_of
from research.tracking import lock_record
from research.tracking.run_folder import RunFolder


def test_every_call_is_a_move_and_the_last_one_is_what_it_does() -> None:
    progress = Progress()
    assert (progress.stage, progress.moves) == (Stage.START, 0)
    progress.advance("building the engine")
    assert (progress.doing, progress.stage, progress.moves) == ("building the engine", Stage.START, 1)
    progress.stepping(5)
    assert (progress.doing, progress.stage, progress.step, progress.moves) == ("step", Stage.TRAINING, 5, 2)
    progress.advance("validation")
    assert (progress.doing, progress.stage, progress.step, progress.moves) == ("validation", Stage.TRAINING, 5, 3)


def test_the_time_of_a_step_is_measured_where_nothing_else_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 13.0, 50.0, 54.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    progress = Progress()
    for expected in (0.0, 3.0):
        progress.stepping(1)
        assert progress.step_seconds == expected
    progress.advance("validation")  # its time is no step's
    for expected in (3.0, 4.0):
        progress.stepping(1)
        assert progress.step_seconds == expected


def test_work_is_busy_until_it_is_over_however_it_ends() -> None:
    progress = Progress()
    progress.stepping(1)
    with pytest.raises(ValueError), progress.work("saving", Stage.SAVING):
        assert (progress.stage, progress.busy, progress.doing) == (Stage.SAVING, 1, "saving")
        with progress.work("one file"):
            assert (progress.stage, progress.busy) == (Stage.SAVING, 2)
        raise ValueError
    assert (progress.stage, progress.busy) == (Stage.TRAINING, 0)


def two(path: Path) -> list[Heartbeats]:
    folder = RunFolder(path)
    folder.logs.mkdir()
    return [Heartbeats(folder, rank, 2, ROOT) for rank in range(2)]


def test_what_one_rank_writes_the_other_reads(tmp_path: Path) -> None:
    ours, theirs = two(tmp_path)
    progress = Progress()
    progress.stepping(7)
    written = ours.next(progress, threading.get_ident())
    assert ours.write(written) and theirs.read(0) == written
    assert (written.rank, written.step, written.stage, written.left) == (0, 7, Stage.TRAINING.value, "")
    assert ours.write(ours.next(progress, 0, left="fault", why="ValueError: no", code=1))
    last = theirs.read(0)
    assert (last.left, last.why, last.code) == ("fault", "ValueError: no", 1)
    ours.remove()
    assert theirs.read(0) is None and [*(tmp_path / "logs").iterdir()] == []


def test_silence_is_counted_while_somebody_reads(tmp_path: Path) -> None:
    ours, theirs = two(tmp_path)
    progress = Progress()
    for silence in (0.0, 0.0, 0.0):
        ours.write(ours.next(progress, 0))  # nothing moves, and still it is alive
        theirs.read_others(5.0)
        assert theirs.silence == {0: silence}
    for silence in (5.0, 10.0):
        theirs.read_others(5.0)
        assert theirs.silence == {0: silence}
    theirs.reset_silence()
    assert theirs.silence == {0: 0.0}
    theirs.read_others(5.0)
    assert theirs.silence == {0: 5.0}


def test_what_is_no_heartbeat_is_silence(tmp_path: Path) -> None:
    _, theirs = two(tmp_path)
    for text in ("", "{}", "[1]", "nonsense"):
        (tmp_path / "logs/rank_0.alive.json").write_text(text)
        theirs.read_others(1.0)
    assert theirs.silence == {0: 4.0} and theirs.latest == {}


def test_heartbeats_of_ranks_that_no_longer_exist_are_removed(tmp_path: Path) -> None:
    ours, theirs = two(tmp_path)
    for heartbeats in (ours, theirs, Heartbeats(RunFolder(tmp_path), 2, 3, ROOT)):
        heartbeats.write(heartbeats.next(Progress(), 0))
    ours.remove_stale()
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank_0.alive.json", "rank_1.alive.json"]


def test_a_file_system_that_refuses_is_told(tmp_path: Path) -> None:
    ours, _ = two(tmp_path)
    (tmp_path / "logs").rmdir()
    assert not ours.write(ours.next(Progress(), 0))


def test_the_stack_is_another_threads_innermost_last() -> None:
    inside, end = threading.Event(), threading.Event()

    def waits_here() -> None:
        inside.set()
        end.wait()

    thread = threading.Thread(target=waits_here)
    thread.start()
    inside.wait()
    found = stack_of(thread.ident or 0, ROOT)
    end.set()
    thread.join()
    assert any(frame.startswith("tests/research/reliability/test_heartbeat.py:") and frame.endswith(" waits_here") for frame in found)
    assert found[-1].endswith(" wait") or sys.version_info >= (3, 13)
    assert stack_of(-1, ROOT) == []


@pytest.mark.parametrize(("change", "beats"), [("write", True), ("add", True), ("remove", False)])
def test_a_file_that_is_removed_is_no_heartbeat(change: str, beats: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person or a clean-up removes the files of a run that is dead; only a rank writes one."""
    folder = RunFolder(tmp_path / "mine" / "aaaaaa")
    folder.logs.mkdir(parents=True)
    for rank in (0, 1):
        folder.heartbeat(rank).write_text("{}")
    changes = {
        "write": lambda: folder.heartbeat(1).write_text('{"beat": 1}'),
        "add": lambda: folder.heartbeat(2).write_text("{}"),
        "remove": lambda: folder.heartbeat(1).unlink(missing_ok=True),
    }
    monkeypatch.setattr(lock_record.time, "sleep", lambda seconds: changes[change]())
    assert bool(lock_record.beating([folder.lock], 0.02)) == beats
