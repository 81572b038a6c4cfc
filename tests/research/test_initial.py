"""`init_from`: what is refused before torch, what ranks compare, and a run that begins with another's weights."""

import json
from pathlib import Path

import pytest

from research import config, initial, run_folder
from research.resume import AUTO, find
from research.run_folder import IMPORTED, RunFolder
from tests.parallel.checkpoints import save
from tests.research.example import example, sentence
from tests.research.runs import Ended, Place, run


def imported(runs: Path, experiment) -> RunFolder:
    folder = run_folder.create(runs, "mine")
    config.save(experiment, folder.config)
    save(folder.checkpoints / "step_000000")
    run_folder.start(folder, layout="", precision="fp32", steps=0)
    run_folder.end(folder, IMPORTED)
    return folder


def test_a_checkpoint_is_taken_whatever_else_is_refused_with_the_one_meant(tmp_path: Path) -> None:
    folder = imported(tmp_path / "runs", example())
    name = f"runs/mine/{folder.id}"
    initial.check(example(), tmp_path)
    initial.check(example(init_from=f"{name}/checkpoints/step_000000"), tmp_path)
    initial.check(example(init_from=str(folder.checkpoints / "step_000000")), Path("/elsewhere"))
    said = sentence(lambda: initial.check(example(init_from=name), tmp_path))
    assert said.endswith(f"→ name {name}/checkpoints/step_000000") and f"init_from = '{name}'" in said
    assert sentence(lambda: initial.check(example(init_from="nothing"), tmp_path)).endswith("→ name runs/NAME/ID/checkpoints/step_N")


def test_ranks_compare_the_weights_they_begin_with(tmp_path: Path) -> None:
    save(tmp_path / "a")
    save(tmp_path / "b", offset=1.0)
    digests = [initial.digest(example(init_from=where), tmp_path) for where in ("a", "b", "c")]
    assert len(set(digests)) == 3 and digests[2] == "missing" and initial.digest(example(), tmp_path) == "drawn"


def test_what_was_imported_is_begun_with_not_resumed(tmp_path: Path) -> None:
    folder = imported(tmp_path / "runs", example())
    assert find(AUTO, example(), Path("mine"), tmp_path / "runs") is None
    said = sentence(lambda: find(str(folder.path), example(), Path("mine"), tmp_path / "runs"))
    assert said.startswith(f"{folder.title} was imported, not trained: it holds weights alone → leave --resume out")


def test_other_weights_to_begin_with_are_another_run(tmp_path: Path) -> None:
    folder = run_folder.create(tmp_path / "runs", "mine")
    config.save(example(init_from="a"), folder.config)
    save(folder.checkpoints / "step_000001")
    run_folder.start(folder, layout="", precision="fp32", steps=2)
    run_folder.end(folder, run_folder.INTERRUPTED)
    assert "init_from a → b" in sentence(lambda: find(AUTO, example(init_from="b"), Path("mine"), tmp_path / "runs"))


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_another_on_another_layout(place: Place, alone: Ended) -> None:
    """At a learning rate of nothing its validations are the last one of the run it begins with; its steps count from 1."""
    start = alone.folder.checkpoints / "step_000006"
    still = dict(optimizer__lr=1e-12, optimizer__min_lr=1e-13, optimizer__weight_decay=0.0)
    ended = run(place, "deepspeed", 2, parallel__tensor=2, init_from=start, **still)
    assert ended.code == 0, ended.err
    assert f"weights  {start} · step 6" in ended.out
    losses, last = ended.column("val/loss"), alone.column("val/loss")[-1]
    assert losses == pytest.approx([last] * 2, rel=1e-5)
    assert [row["progress/step"] for row in ended.rows("val/loss")] == [3, 6]
    assert abs(last - alone.column("val/loss")[0]) > 0.01  # else the drawn weights might do
    assert json.loads(ended.folder.config.read_text())["init_from"] == str(start)
