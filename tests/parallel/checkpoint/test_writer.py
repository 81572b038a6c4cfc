"""A checkpoint is complete or absent, whichever rank is killed and whenever the disk refuses; every rank raises, and older ones remain."""

import os
import resource
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint import tensor_file, writer
from parallel.checkpoint.folder import latest, retain
from parallel.checkpoint.reader import Reader
from parallel.checkpoint.writer import CheckpointWriter, Part, files_of
from parallel.errors import Mistake
from parallel.grid import Grid, make_grid
from tests.harness import RankFailed, run_ranks
from tests.parallel.helpers.checkpoints import TENSORS, by_another_reader, hidden, save, save_on


def first_element(folder: Path) -> float:
    with Reader(folder) as reader:
        reader.check()
        return float(reader.read("layer.0.weight")[0, 0])


# One process.


def test_what_is_written_is_read_by_numpy(tmp_path: Path) -> None:
    found = by_another_reader(save(tmp_path / "step_1", offset=0.5))
    assert list(found) == ["weights"]
    assert {name: value.tolist() for name, value in found["weights"].items()} == {name: (t + 0.5).tolist() for name, t in TENSORS.items()}


def test_it_tells_what_it_has_written(tmp_path: Path) -> None:
    parts = [Part("weights", "a", (3,), 0, 0, 3)]
    writing = CheckpointWriter(tmp_path / "run" / "step_1", parts, {"step": 1}, Grid())
    writing.write(torch.zeros(3))
    saved = writing.finish()
    assert saved.folder == tmp_path / "run" / "step_1" and saved.size == 12 and 0 <= saved.seconds < 60
    assert latest(tmp_path / "run") == saved.folder


def test_files_are_cut_at_their_size(tmp_path: Path) -> None:
    folder = save(tmp_path / "step_1", bytes_per_file=200)  # two tensors of 80 bytes
    assert [len(load_file(file)) for file in sorted(folder.glob("*.safetensors"))] == [2, 2, 2]
    with Reader(folder) as reader:
        assert list(reader) == list(TENSORS) and all(torch.equal(reader.read(name), tensor) for name, tensor in TENSORS.items())


def test_a_part_larger_than_a_file_has_one_of_its_own() -> None:
    sizes = {"weights": [10, 10, 30, 5, 20], "exp_avg": [25]}  # elements of four bytes
    parts = [Part(kind, f"{kind}{i}", (size,), 0, 0, size) for kind, found in sizes.items() for i, size in enumerate(found)]
    plan = {name: [part.length for part in held] for name, held in files_of(parts, 7, bytes_per_file=100).items()}
    assert list(plan.values()) == [[10, 10], [30], [5, 20], [25]]
    assert list(plan) == [
        *(f"weights-rank00007-{i:03d}.safetensors" for i in range(3)),
        "exp_avg-rank00007-000.safetensors",
    ]


def test_the_same_step_saved_again_replaces_the_older(tmp_path: Path) -> None:
    save(tmp_path / "step_1")
    save(tmp_path / "step_1", offset=10.0)
    assert first_element(latest(tmp_path)) == 10.0 and hidden(tmp_path) == []


def test_too_few_tensors_are_not_a_checkpoint(tmp_path: Path) -> None:
    writing = CheckpointWriter(tmp_path / "step_1", [Part("weights", "a", (3,), 0, 0, 3)], {"step": 1}, Grid())
    with pytest.raises(RuntimeError, match="was to be written and was not"):
        writing.finish()
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_read_is_not_published(tmp_path: Path) -> None:
    """A writer's own mistake, here a gap between two parts, is found before it is too late."""
    parts = [Part("weights", "a", (9,), 0, first, 3) for first in (0, 6)]
    writing = CheckpointWriter(tmp_path / "step_1", parts, {"step": 1}, Grid())
    for _ in parts:
        writing.write(torch.zeros(3))
    with pytest.raises(ValueError, match="lacks 3:6"):
        writing.finish()
    assert list(tmp_path.iterdir()) == []


# Killed with -9: each rank, in each phase.


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(owner: object, name: str, nth: int = 1, half_way: Callable | None = None) -> None:
    """This process dies where it calls `owner.name` for the nth time; after `half_way` of it, where that is given."""
    inner, calls = getattr(owner, name), []

    def deadly(*arguments, **settings):
        calls.append(arguments)
        if len(calls) == nth:
            if half_way:
                half_way(*arguments)
            die()
        return inner(*arguments, **settings)

    setattr(owner, name, deadly)


def half_a_tensor(file: tensor_file.TensorFile, data) -> None:
    file.file.write(memoryview(data)[: len(data) // 2])


PHASES: dict[str, tuple[tuple, tuple[int, ...]]] = {  # what is called there, and by which ranks
    "before its own file": ((writer, "TensorFile"), (0, 1)),
    "within a tensor": ((tensor_file.TensorFile, "_write", 3, half_a_tensor), (0, 1)),
    "before its file is on disk": ((tensor_file.TensorFile, "close"), (0, 1)),
    "before the ranks meet": ((CheckpointWriter, "finish"), (0, 1)),
    "before the manifest": ((checkpoint_folder, "write_synced"), (0,)),
    "before the rename": ((Path, "rename"), (0,)),
    "between rename and latest": ((checkpoint_folder, "point_latest"), (0,)),
    "before latest is replaced": ((Path, "replace"), (0,)),
    "in retention, before anything is deleted": ((checkpoint_folder, "_delete"), (0,)),
    "in retention, half deleted": ((os, "unlink", 1), (0,)),
}
KILLS = [(phase, rank) for phase, (_, ranks) in PHASES.items() for rank in ranks]
AFTER_THE_RENAME = {phase for phase in PHASES if "latest" in phase or "retention" in phase}


def save_and_be_killed(checkpoints: Path, phase: str, victim: int) -> None:
    grid = make_grid(1, 1)
    if grid.rank == victim:
        die_at(*PHASES[phase][0])
    save_on(grid, checkpoints / "step_3", offset=30.0, step=3)
    if grid.rank == 0:
        retain(checkpoints, keep_last=2)


@pytest.mark.parametrize(("phase", "victim"), KILLS)
def test_kill_9_leaves_a_whole_latest(phase: str, victim: int, tmp_path: Path) -> None:
    """Of steps 1 and 2, while step 3 is saved and step 1 is to be deleted: `latest` is one of them, whole; so is what has no dot."""
    for step in (1, 2):
        save(tmp_path / f"step_{step}", offset=10.0 * step, step=step)
    with pytest.raises(RankFailed, match=f"--- rank {victim} ---\ndied without a word"):
        run_ranks(save_and_be_killed, 2, tmp_path, phase, victim)
    for path in (path for path in tmp_path.iterdir() if path.is_dir() and not path.name.startswith(".")):
        assert first_element(path) == 10.0 * int(path.name[-1]), "a folder without a dot is whole"
    found = latest(tmp_path)
    assert found.name == ("step_3" if "retention" in phase else "step_2") or (phase in AFTER_THE_RENAME and found.name == "step_3")
    assert (tmp_path / "step_3").exists() == (phase in AFTER_THE_RENAME)
    save(tmp_path / "step_4", offset=40.0, step=4)
    assert first_element(latest(tmp_path)) == 40.0 and hidden(tmp_path) == []


def save_again_and_be_killed(folder: Path, phase: str, nth: int) -> None:
    owner, name, *_ = PHASES[phase][0]
    die_at(owner, name, nth)
    save(folder, offset=10.0)


REPLACING = [("before its own file", 1), ("before the manifest", 1), ("before the rename", 1), ("before the rename", 2)]
REPLACING += [("between rename and latest", 1), ("before latest is replaced", 1)]


@pytest.mark.parametrize(("phase", "nth"), REPLACING)
def test_kill_9_while_a_step_is_replaced_loses_nothing(phase: str, nth: int, tmp_path: Path) -> None:
    save(tmp_path / "step_1")
    with pytest.raises(RankFailed, match="died without a word"):
        run_ranks(save_again_and_be_killed, 1, tmp_path / "step_1", phase, nth)
    assert first_element(latest(tmp_path)) == (10.0 if phase in AFTER_THE_RENAME else 0.0)
    save(tmp_path / "step_1", offset=20.0)
    assert first_element(latest(tmp_path)) == 20.0 and hidden(tmp_path) == []


# Disks that refuse.


def words_of(save_it: Callable, *arguments: object) -> str:
    try:
        save_it(*arguments)
    except Mistake as mistake:
        return str(mistake)
    return "saved"


def save_where_files_are_short(checkpoints: Path, unlucky: int) -> str:
    """The kernel lets one rank's files grow to 500 bytes, as a full disk would; EFBIG instead of ENOSPC."""
    grid = make_grid(1, 1)
    if grid.rank == unlucky:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
    told = words_of(save_on, grid, checkpoints / "step_2")
    if grid.rank == unlucky:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    again = words_of(save_on, grid, checkpoints / "step_3")
    return f"{told} | {again}"


@pytest.mark.parametrize("unlucky", [0, 1])
def test_a_full_disk_of_one_rank_is_told_by_all(unlucky: int, tmp_path: Path) -> None:
    """No rank waits for another, none saves, `latest` stays; once there is room the next save works."""
    save(tmp_path / "step_1")
    first, second = run_ranks(save_where_files_are_short, 2, tmp_path, unlucky)
    assert first == second and first.endswith("| saved")
    assert ".step_2.partial" in first and "cannot be written, File too large: the checkpoint needs 0.0 MB, its disk has" in first
    assert "→ make room there" in first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1", "step_3"]


def save_here(folder: Path) -> list[str]:
    return [words_of(save_on, make_grid(1, 1), folder)]


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 64 kB; one needs to be root to make it."""
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if made.returncode:
        pytest.skip("this user may not mount a file system")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_disk_that_fills_up_is_told_with_need_and_have(small_disk: Path, monkeypatch) -> None:
    run = small_disk / "run"
    run.mkdir()
    save(run / "step_1")
    (small_disk / "filler").write_bytes(b"x" * 30_000)
    shapes, tensors = {"a": (10_000,)}, [torch.zeros(10_000)]
    with pytest.raises(Mistake, match=r"step_2 needs 0\.0 MB, its disk has 0\.0 MB free"):
        writer.write(run / "step_2", shapes, tensors, {"step": 2})
    monkeypatch.setattr(checkpoint_folder, "free_bytes", lambda folder: None)  # a disk that does not know beforehand
    with pytest.raises(Mistake, match=r"\.step_2\.partial.* cannot be written, No space left on device"):
        writer.write(run / "step_2", shapes, tensors, {"step": 2})
    assert sorted(path.name for path in run.iterdir()) == ["latest", "step_1"] and first_element(latest(run)) == 0.0


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """Whole tensors are taken one at a time: the first is on disk when the second cannot be had."""
    seen = []

    def weights():
        yield torch.zeros(2)
        seen.extend(path.name for path in (tmp_path / ".step_0.partial").iterdir())
        raise Mistake("no more")

    with pytest.raises(Mistake, match="no more"):
        writer.write(tmp_path / "step_0", {"a": (2,), "b": (3,)}, weights(), {"step": 0})
    assert seen == ["weights-rank00000-000.safetensors"] and list(tmp_path.iterdir()) == []


def test_a_disk_that_is_read_only_is_told(small_disk: Path) -> None:
    save(small_disk / "step_1")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for told in run_ranks(save_here, 2, small_disk / "step_2"):
        assert told == [told[0]] and "cannot be written, Read-only file system" in told[0]
    assert first_element(latest(small_disk)) == 0.0


def save_as_nobody(folder: Path) -> list[str]:
    grid = make_grid(1, 1)
    if os.geteuid() == 0:  # root may write anywhere
        os.seteuid(65534)
    told = words_of(save_on, grid, folder)
    os.seteuid(os.getuid())
    return [told]


def test_a_folder_that_may_not_be_written_is_told_by_all() -> None:
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o555)
        first, second = run_ranks(save_as_nobody, 2, Path(place) / "step_1")
        assert first == second and "cannot be written, Permission denied" in first[0] and str(place) in first[0]


def save_below_a_file(folder: Path) -> list[str]:
    return save_here(folder / "checkpoints" / "step_1")


def test_a_folder_below_a_file_is_told_by_all(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    first, second = run_ranks(save_below_a_file, 2, tmp_path / "run")
    assert first == second and "cannot be written, Not a directory" in first[0]


def save_on_disks_of_their_own(place: Path) -> str:
    """What rank 1 writes is not seen by rank 0."""
    grid = make_grid(1, 1)
    if grid.rank == 1:
        inner = tensor_file.TensorFile.close

        def elsewhere(self):
            told = inner(self)
            self.path.rename(place / self.path.name)
            return told

        tensor_file.TensorFile.close = elsewhere
    return words_of(save_on, grid, place / "run" / "step_1")


def test_ranks_that_do_not_share_a_disk_are_told(tmp_path: Path) -> None:
    first, second = run_ranks(save_on_disks_of_their_own, 2, tmp_path)
    assert first == second
    assert "weights-rank00001-000.safetensors, which another rank has written, is not in" in first and "that all ranks share" in first
    assert list((tmp_path / "run").iterdir()) == []


def fail_on_one(place: Path) -> str:
    grid = make_grid(1, 1)
    if grid.rank == 1:
        tensor_file.TensorFile.add = lambda self, tensor: 1 // 0
    try:
        save_on(grid, place / "step_1")
    except (RuntimeError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def test_an_error_of_our_own_is_raised_by_all_and_names_its_rank(tmp_path: Path) -> None:
    first, second = run_ranks(fail_on_one, 2, tmp_path)
    assert second == "ZeroDivisionError: integer division or modulo by zero"
    assert first == f"RuntimeError: rank 1 on {socket.gethostname()} failed: {second}"
    assert list(tmp_path.iterdir()) == []
