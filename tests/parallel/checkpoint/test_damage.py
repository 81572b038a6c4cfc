"""Whole and damaged checkpoints: what is found without hashes, with them, and what retention makes of it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from parallel.checkpoint.damage import damage_of, read_manifest
from parallel.checkpoint.folder import latest, newest_whole, retain, set_aside, steps, up_to_latest
from parallel.checkpoint.reader import Reader
from parallel.errors import Damaged, Mistake
from tests.parallel.helpers.checkpoints import save


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 1 to 4."""
    for step in (1, 2, 3, 4):
        save(tmp_path / f"step_{step}", step=step)
    return tmp_path


def data(checkpoint: Path) -> Path:
    return sorted(checkpoint.glob("*.safetensors"))[0]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def to_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


SEEN: list[tuple[str, Callable[[Path], object]]] = [
    ("bytes, the manifest says", lambda checkpoint: os.truncate(data(checkpoint), 10)),
    ("bytes, the manifest says", lambda checkpoint: data(checkpoint).open("ab").write(b"x")),
    ("is missing", lambda checkpoint: data(checkpoint).unlink()),
    ("no content", lambda checkpoint: to_a_pipe(data(checkpoint))),
    ("not a file", lambda checkpoint: to_a_pipe(checkpoint / "manifest.json")),
    ("is damaged", lambda checkpoint: flip(checkpoint / "manifest.json", -60)),
    ("is not the manifest", lambda checkpoint: (checkpoint / "manifest.json").write_bytes(b"")),
]


@pytest.mark.parametrize(("said", "break_it"), SEEN)
def test_damage_that_needs_no_hash(said: str, break_it: Callable[[Path], object], run: Path) -> None:
    assert damage_of(run / "step_4") == damage_of(run / "step_4", hashes=True) == ""
    break_it(run / "step_4")
    assert said in damage_of(run / "step_4") and "→" not in damage_of(run / "step_4")
    if said not in ("no content", "not a file"):
        assert newest_whole(steps(run))[0] == run / "step_3"


def test_a_flipped_bit_needs_the_hashes(run: Path) -> None:
    flip(data(run / "step_4"), -1)
    assert damage_of(run / "step_4") == "" and "has the SHA-256" in damage_of(run / "step_4", hashes=True)
    whole, damaged = newest_whole(steps(run), hashes=True)
    assert whole == run / "step_3" and list(damaged) == [run / "step_4"]
    with Reader(run / "step_4") as reader, pytest.raises(Damaged, match="is damaged: SHA-256"):
        reader.check()


def test_another_format_is_no_damage(run: Path) -> None:
    """It is for a newer version to read, so nothing falls back over it, and retention counts it."""
    path = run / "step_4" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    assert damage_of(run / "step_4") == ""
    with pytest.raises(Mistake, match="use the version that wrote it") as refused:
        read_manifest(run / "step_4")
    assert not isinstance(refused.value, Damaged)


def test_retention_does_not_count_a_damaged_one_and_does_not_delete_it(run: Path) -> None:
    """keep_last = 2: two whole ones are kept, and the damaged newest beside them."""
    data(run / "step_4").unlink()
    assert retain(run, keep_last=2) == ["step_1"]
    assert [path.name for path in steps(run)] == ["step_2", "step_3", "step_4"]
    data(run / "step_3").unlink()
    assert retain(run, keep_last=2) == [] and damage_of(run / "step_2") == ""


def test_what_is_set_aside_is_read_counted_and_deleted_by_nothing(run: Path) -> None:
    (run / "step_4.damaged").mkdir()
    set_aside([run / "step_4", run / "step_3"])
    names = sorted(path.name for path in run.iterdir() if path.is_dir())
    assert names == ["step_1", "step_2", "step_3.damaged", "step_4.damaged", "step_4.damaged-2"]
    assert latest(run) == run / "step_2" and retain(run, keep_last=1) == ["step_1"]
    set_aside([run / "step_2"])
    assert steps(run) == [] and not (run / "latest").exists()


def test_checkpoints_after_the_latest_are_of_a_future_that_was_left(run: Path) -> None:
    assert len(up_to_latest(run)) == 4
    (run / "latest").write_text("step_2")
    assert [path.name for path in up_to_latest(run)] == ["step_1", "step_2"]
    (run / "latest").write_text("nonsense")
    assert len(up_to_latest(run)) == 4
