"""A run's folder of checkpoints: what `latest` may contain, which checkpoints are kept or in use, and what killed writers leave."""

import fcntl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.folder import begin, hold, latest, newest_complete, retain, steps, still_there
from parallel.checkpoint.reader import Reader
from parallel.errors import Mistake
from tests.parallel.helpers.checkpoints import hidden, save


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 1, 2, … 6 and 10."""
    for step in (1, 2, 3, 4, 5, 6, 10):
        save(tmp_path / f"step_{step}", step=step)
    return tmp_path


def names(checkpoints: Path) -> list[str]:
    return [path.name for path in steps(checkpoints)]


# latest.


def test_latest_is_the_last_saved(run: Path) -> None:
    assert latest(run) == run / "step_10"
    save(run / "step_3", offset=1.0)
    assert latest(run) == run / "step_3" and newest_complete(run) == run / "step_10"


GARBAGE = ["", "\n", "../elsewhere", "/tmp", "step_9", "step_1/../step_2", ".", "..", "a\0b", "ä" * 400, "\udcff", "step_2\nstep_3"]


@pytest.mark.parametrize("text", GARBAGE)
def test_a_latest_that_names_none_is_refused_with_the_way_out(text: str, run: Path) -> None:
    (run.parent / "elsewhere").mkdir(exist_ok=True)
    (run / "latest").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(Mistake, match="not a checkpoint beside it → write step_10 into it, the newest complete one") as refused:
        latest(run)
    assert str(run / "latest") in str(refused.value)


def test_a_latest_that_is_a_folder_is_refused(run: Path) -> None:
    (run / "latest").unlink()
    (run / "latest").mkdir()
    with pytest.raises(Mistake, match="→ write step_10 into it"):
        latest(run)


def test_an_incomplete_folder_is_not_latest(run: Path) -> None:
    (run / "step_10" / "manifest.json").unlink()
    with pytest.raises(Mistake, match="→ write step_6 into it, the newest complete one"):
        latest(run)


def test_a_stale_latest_alone_has_no_way_out(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("step_1")
    with pytest.raises(Mistake, match="→ no checkpoint there is complete"):
        latest(tmp_path)


def test_a_run_without_a_checkpoint_is_told_so(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "never made"):
        with pytest.raises(Mistake, match="holds no complete checkpoint"):
            latest(folder)


def test_without_a_pointer_the_newest_complete_one_is_latest(run: Path) -> None:
    """A writer killed between the rename and the pointer of its first checkpoint leaves this."""
    (run / "latest").unlink()
    assert latest(run) == run / "step_10"


# Retention.


def test_the_last_and_every_nth_are_kept(run: Path) -> None:
    assert retain(run, keep_last=2, keep_every=3) == ["step_1", "step_2", "step_4", "step_5"]
    assert names(run) == ["step_3", "step_6", "step_10"] and hidden(run) == []


def test_steps_are_compared_as_numbers(run: Path) -> None:
    retain(run, keep_last=1)
    assert names(run) == ["step_10"], "and not as text, where 6 comes after 10"


def test_what_latest_names_is_kept(run: Path) -> None:
    (run / "latest").write_text("step_2")
    retain(run, keep_last=1)
    assert names(run) == ["step_2", "step_10"]


def test_what_the_caller_uses_is_kept(run: Path) -> None:
    retain(run, keep_last=1, in_use={"step_4"})
    assert names(run) == ["step_4", "step_10"]


def test_a_reader_keeps_its_checkpoint(run: Path) -> None:
    with Reader(run / "step_1") as reader, Reader(run / "step_1"), Reader(run / "step_3"):
        assert retain(run, keep_last=1) == ["step_2", "step_4", "step_5", "step_6"]
        assert reader.read("layer.1.weight")[0, 0] == 1.0
        reader.check()
    assert retain(run, keep_last=1) == ["step_1", "step_3"]


HOLD = "import fcntl, sys; f = open(sys.argv[1], 'rb'); fcntl.flock(f, fcntl.LOCK_SH); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def another_reader(run: Path) -> Iterator[subprocess.Popen]:
    """Another process that reads step 1."""
    command = [sys.executable, "-c", HOLD, str(run / "step_1" / "manifest.json")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_reader_in_another_process_keeps_its_checkpoint_until_it_dies(run: Path, another_reader: subprocess.Popen) -> None:
    retain(run, keep_last=1)
    assert names(run) == ["step_1", "step_10"]
    another_reader.kill()  # -9: nothing of its own is run
    another_reader.wait()
    retain(run, keep_last=1)
    assert names(run) == ["step_10"]


def test_what_is_not_a_checkpoint_of_a_step_is_left_alone(run: Path) -> None:
    for name in ("best", "step_x", "step_"):
        save(run / name)
    (run / "step_0").mkdir()  # no manifest: somebody else's
    (run / "step_7").write_text("a file")
    save(run / "step_10")
    retain(run, keep_last=1)
    assert sorted(path.name for path in run.iterdir()) == ["best", "latest", "step_", "step_0", "step_10", "step_7", "step_x"]


@pytest.mark.parametrize(("last", "every"), [(0, 0), (-1, 0), (1, -1)])
def test_keeping_nothing_is_refused(last: int, every: int, run: Path) -> None:
    with pytest.raises(Mistake, match="cannot be kept → keep the last 1 or more"):
        retain(run, last, every)


def test_a_checkpoint_that_is_being_deleted_is_not_read(run: Path) -> None:
    with open(run / "step_1" / "manifest.json", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Mistake, match="is being deleted.* → use a newer one"):
            Reader(run / "step_1")


def test_where_there_are_no_locks_reading_and_deleting_go_on(run: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(checkpoint_folder.fcntl, "flock", refuse)
    with Reader(run / "step_1") as reader:
        assert len(list(reader)) == 6
    retain(run, keep_last=1)
    assert names(run) == ["step_10"]


def test_a_disk_that_refuses_to_delete_does_not_stop_the_run(run: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("busy")

    monkeypatch.setattr(checkpoint_folder.shutil, "rmtree", refuse)
    assert len(retain(run, keep_last=1)) == 6 and names(run) == ["step_10"]
    assert len(hidden(run)) == 6
    monkeypatch.undo()
    save(run / "step_11")
    assert hidden(run) == [], "the next save went on with it"


# Leftovers, and the same step again.


def test_what_killed_writers_left_is_removed_by_the_next_save(run: Path) -> None:
    for name in (".step_11.partial", ".step_12.deleted", ".step_10.replaced"):
        (run / name).mkdir()
        (run / name / "manifest.json").write_text("{}")
    (run / ".latest.partial").write_text("step_")
    (run / ".mine").write_text("kept")
    begin(run / "step_12", 0)
    assert hidden(run) == [".mine", ".step_12.partial"]


def test_a_replaced_one_without_successor_is_found_and_put_back(run: Path) -> None:
    """Killed between the two renames of saving a step again."""
    (run / "step_10").rename(run / ".step_10.replaced")
    assert latest(run) == run / ".step_10.replaced"
    begin(run / "step_12", 0)
    assert latest(run) == run / "step_10" and (run / "step_10" / "manifest.json").is_file()


def test_a_link_is_unlinked_and_what_it_points_to_left(run: Path, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "precious").write_text("x")
    (run / ".a.partial").symlink_to(elsewhere)
    begin(run / "step_12", 0)
    assert (elsewhere / "precious").is_file() and not (run / ".a.partial").exists()


def test_a_held_checkpoint_knows_that_another_took_its_name(run: Path) -> None:
    with hold(run / "step_1") as held:
        assert still_there(run / "step_1", held)
        save(run / "step_1", offset=5.0)
        assert not still_there(run / "step_1", held)


# Room.


def test_a_disk_without_room_is_refused_before_anything_is_written(run: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint_folder, "free_bytes", lambda folder: 3_000_000)
    with pytest.raises(Mistake, match=r"step_11 needs 12\.5 MB, its disk has 3\.0 MB free → make room"):
        begin(run / "step_11", 12_500_000)
    assert hidden(run) == []


def test_a_disk_that_cannot_say_what_it_has_is_tried(run: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint_folder, "free_bytes", lambda folder: None)
    begin(run / "step_11", 10**18)
