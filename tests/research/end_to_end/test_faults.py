"""Faults of a disk or a rank while a run trains: nothing is lost, and the resumed run is equal bit for bit."""

import functools
import json
import random
import signal
import socket
from pathlib import Path

import pytest

from parallel.checkpoint.folder import latest
from parallel.files import read_json
from research.cluster.exit_codes import DAMAGED, DISK
from research.tracking.acquire_lock import is_held
from research.tracking.run_folder import RunFolder
from research.verification import torture
from tests.research.helpers import small_runs as r
from tests.research.helpers.small_runs import PHASES, Ended, Stage

HOST = socket.gethostname()
BY_RANK_0 = ("begun", "before the manifest", "before the rename", "before latest", "before an old one goes")
FILES = {"a file is begun": 3, "a file is complete": 3, "before the rename": 2}
"""How often a rank enters a phase in one save: one file each for weights and both moments; the folder and its parent."""
KILLS = [
    (phase, victim, save * FILES.get(phase, 1) + 1)
    for phase in PHASES
    for victim in (0, 1)
    for save in (0, 1)
    if victim == 0 or phase not in BY_RANK_0
]


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def whole(stage: Stage) -> Ended:
    return stage.run("whole", 2, model=r.DROPS, parallel={"tensor": 2})


@pytest.mark.slow  # quick ones: the disk that fills up, and test_writer.py in tests/parallel/checkpoint
@pytest.mark.parametrize(
    ("phase", "victim", "times"),
    [
        ("a file is complete", 1, 8),
        *((phase, victim, (times - 1) * FILES.get(phase, 1) + 1) for phase, victim, times in KILLS),
    ],
)
def test_kill_9_in_a_save(stage: Stage, whole: Ended, phase: str, victim: int, times: int) -> None:
    """In every phase a whole checkpoint is left (or, in the first save, perhaps none), and the run resumes from it."""
    name = f"killed_{phase}_{victim}_{times}".replace(" ", "_")
    killed = stage.run(name, 2, prelude=functools.partial(r.killed_in_a_save, phase, victim, times), model=r.DROPS, parallel={"tensor": 2})
    assert killed.codes[victim] == -9 and all(killed.codes)
    complete = sorted(path.name for path in killed.folder.checkpoints.glob("step_*"))
    for path in complete:
        assert json.loads((killed.folder.checkpoints / path / "manifest.json").read_text())["step"] == int(path[5:])
    resumed = stage.run(name, 2, resume="auto", model=r.DROPS, parallel={"tensor": 2})
    assert set(resumed.codes) == {0}, resumed.said
    assert resumed.hexes() == whole.hexes()
    if complete:
        assert resumed.folder == killed.folder and complete[-1] in resumed.said
    assert not list(resumed.folder.checkpoints.glob(".step*"))  # what the killed save left behind is gone


def test_a_disk_that_fills_up_is_named_and_the_run_goes_on_from_before(stage: Stage, whole: Ended) -> None:
    full = stage.run("full", 2, prelude=r.disk_full_in_save_2, model=r.DROPS, parallel={"tensor": 2})
    assert set(full.codes) == {DISK}, full.said
    assert (read_json(full.folder.run)["status"], read_json(full.folder.run)["code"]) == ("failed", DISK)
    assert "File too large" in full.said and "the checkpoint needs" in full.said and "free → make room" in full.said
    assert latest(full.folder.checkpoints).name == "step_000003"
    resumed = stage.run("full", 2, resume="auto", model=r.DROPS, parallel={"tensor": 2})
    assert set(resumed.codes) == {0} and resumed.hexes() == whole.hexes()
    assert not list(resumed.folder.checkpoints.glob(".step*"))


@pytest.mark.parametrize(
    ("prelude", "said"),
    [
        (r.other_seed_on_rank_1, f"rank 1 on {HOST} has seed = 99, rank 0 on {HOST} has 1 → "),
        (r.other_text_on_rank_1, f"(rank 0) (rank 1 on {HOST}) data.train = 'train.txt' is damaged → copy it again"),
        (r.no_room, "the disk of "),
        pytest.param(r.folder_is_read_only, "cannot be written (Read-only file system) → set track.runs", marks=pytest.mark.slow),
    ],
)
def test_preflight_refuses_before_the_first_step_and_leaves_no_run(stage: Stage, prelude, said: str) -> None:
    """Every rank says the same, whichever has found it."""
    name = f"preflight_{prelude.__name__}"
    ended = stage.run(name, 2, prelude=prelude)
    assert set(ended.codes) == {DISK if prelude is r.no_room else 2} and said in ended.said
    assert ended.run is None and not [*(stage.place / name).glob("*")]
    assert "needs 0.4 MB, and 3 new ones at once" in ended.said or prelude is not r.no_room


def test_a_crash_before_the_first_step_leaves_its_run(stage: Stage) -> None:
    ended = stage.run("crash", prelude=r.crash_before_step_1)
    run = read_json(ended.folder.run)
    assert ended.codes == [1] and (run["status"], run["reason"]) == ("failed", "RuntimeError: a fault of ours")
    assert (ended.folder.path.parent / "latest").resolve() == ended.folder.path


@pytest.mark.slow
@pytest.mark.parametrize("offset", range(4))
def test_flipped_bits_are_found_before_a_step(stage: Stage, whole: Ended, offset: int) -> None:
    """Through the training loop; tests/parallel tests 100 random offsets."""
    import shutil

    place = stage.place / f"flipped_{offset}"
    shutil.copytree(stage.place / "whole", place, symlinks=True)
    folder = RunFolder(place / "gpt_sotu" / whole.folder.id)
    dice = random.Random(offset)
    file = dice.choice(sorted((folder.checkpoints / "step_000012").glob("*.safetensors")))
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)
    ended = stage.run(f"flipped_{offset}", 2, resume=str(folder.path), model=r.DROPS, parallel={"tensor": 2}, schedule={"steps": 20})
    assert set(ended.codes) == {DAMAGED} and file.name in ended.said and max(ended.rows()) == 12


def test_torture_finds_a_run_that_lost_something() -> None:
    assert torture.difference({1: "a", 2: "b"}, {1: "a", 2: "b"}) == ""
    assert "step 2 and 0 more are missing" in torture.difference({1: "a", 2: "b"}, {1: "a"})
    assert "step 2: loss c instead of b" in torture.difference({1: "a", 2: "b"}, {1: "a", 2: "c"})


@pytest.mark.slow
def test_twenty_tortured_runs_lose_nothing(tmp_path: Path, capsys) -> None:
    from research.config.experiment_folder import load

    assert torture.torture(load(r.ROOT / "experiments/gpt_sotu"), tmp_path, 20, 2, seed=1)[1] == 0
    assert "0 lost runs of 20" in capsys.readouterr().out


@pytest.mark.slow
def test_a_chain_of_five_kinds_of_kill_loses_nothing(stage: Stage) -> None:
    """A signal, kill -9 of either rank, kill -9 in a save, an error: all 30 losses and every bit of the last weights and moments."""
    settings = {"model": r.DROPS, "parallel": {"tensor": 2}, "schedule": {"steps": 30}}
    undisturbed = stage.run("chain_undisturbed", 2, **settings)
    kills = [
        (functools.partial(r.signalled, signal.SIGUSR1, 1, 5), {138}),
        (functools.partial(r.signalled, signal.SIGKILL, 0, 10), {-9}),
        (functools.partial(r.signalled, signal.SIGKILL, 1, 14), {-9}),
        (functools.partial(r.killed_in_a_save, "before the rename", 0, 3), {-9}),
        (functools.partial(r.raises_in_step, 22), {1}),
    ]
    for prelude, codes in kills:
        killed = stage.run("chain", 2, resume="auto", prelude=prelude, **settings)
        assert codes & set(killed.codes) and all(killed.codes), killed.said
    ended = stage.run("chain", 2, resume="auto", **settings)
    assert ended.codes == [0, 0], ended.said
    assert ended.hexes() == undisturbed.hexes() and list(ended.hexes()) == list(range(1, 31))
    assert r.bits(ended.folder) == r.bits(undisturbed.folder)
    assert len(read_json(ended.folder.run)["segments"]) == 6 and not is_held(ended.folder.lock)
