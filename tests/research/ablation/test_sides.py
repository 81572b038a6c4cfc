"""Which runs a side has, and the sentences for sides that have none."""

import math
from pathlib import Path

import pytest

from models.estimates.flops import training_flops
from research.ablation.sides import find_side, find_sides
from tests.research.ablation.helpers.finished_runs import write_run
from tests.research.helpers.example import example, sentence


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def test_a_side_by_name_by_folder_and_run_by_run(runs: Path) -> None:
    b, a = write_run(runs, "gpt", 2, [3.0]), write_run(runs, "gpt", 1, [3.0])
    by_title = f"{a.title},{b.path}"
    for word, label in (("gpt", "gpt"), ("runs/gpt", "gpt"), (by_title, f"{a.title}, {b.title}")):
        side = find_side(word)
        assert [(seed, run.folder.id) for seed, run in side.runs.items()] == [(1, a.id), (2, b.id)]
        assert (side.label, side.warnings) == (label, ())
    assert [*find_side("runs/gpt/latest").runs] == [1]
    assert [side.label for side in find_sides(["gpt", "runs/gpt"])] == ["gpt", "runs/gpt"]


def test_an_experiments_folder_names_its_runs(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "experiments" / "gpt"
    folder.mkdir(parents=True)
    text = "from tests.research.helpers.example import example\n"
    (folder / "config.py").write_text(f"{text}config = example(track={{'runs': {str(tmp_path / 'elsewhere')!r}}})\n")
    run = write_run(tmp_path / "elsewhere", "gpt", 1, [3.0])
    assert find_side(str(folder)).runs[1].folder.id == run.id


def test_settings_choose_among_runs(runs: Path) -> None:
    for lr in (0.003, 0.001):
        for seed in (1, 2):
            write_run(runs, "gpt", seed, [3.0], optimizer={"lr": lr})
    said = sentence(lambda: find_side("gpt"))
    assert said.startswith(
        "the 4 finished runs of gpt differ in optimizer.lr: 0.003, 0.001 → name one kind of them, such as gpt:optimizer.lr="
    )
    side = find_side("gpt:optimizer.lr=0.001,model.norm=layernorm")
    assert side.label == "gpt:optimizer.lr=0.001,model.norm=layernorm"
    assert {run.experiment.optimizer.lr for run in side.runs.values()} == {0.001} and [*side.runs] == [1, 2]
    assert "there is no setting optimizer.lrr → did you mean optimizer.lr?" in sentence(lambda: find_side("gpt:optimizer.lrr=1"))
    said = sentence(lambda: find_side("gpt:optimizer.lr=0.002"))
    assert said == "gpt has no finished run with optimizer.lr = 0.002 → its runs have 0.001 and 0.003"


def test_layouts_and_intervals_are_no_mixture_and_the_newest_run_of_a_seed_counts(runs: Path) -> None:
    write_run(runs, "gpt", 1, [3.0])
    newest = write_run(runs, "gpt", 1, [2.9], parallel={"tensor": 2}, schedule={"log_every": 5})
    side = find_side("gpt")
    assert side.runs[1].folder.id == newest.id
    assert side.warnings == (f"gpt has several runs of seed 1: {newest.title} is compared, which started last",)


def test_runs_that_have_not_ended(runs: Path) -> None:
    running = write_run(runs, "gpt", 1, [3.0, 2.9], "running")
    expected = f"{running.title} has not finished: it is running at step 200 of 200 → only finished runs are compared"
    assert sentence(lambda: find_side(running.title)).startswith(expected)
    said = sentence(lambda: find_side("gpt"))
    assert said.startswith(f"gpt has no finished run: {running.title} has not finished") and "--seed 1" in said
    failed, done = write_run(runs, "gpt", 2, [3.0], "failed"), write_run(runs, "gpt", 3, [3.0])
    side = find_side("gpt")
    assert [run.folder.id for run in side.runs.values()] == [done.id]
    (warning,) = side.warnings
    assert warning.startswith("left out of gpt: ") and f"{failed.title} has not finished: it is failed (a reason) at step 100" in warning
    assert f"{failed.title} has not finished" in sentence(lambda: find_side(f"{done.title},{failed.path}"))


def test_a_strangers_rows(runs: Path) -> None:
    run = write_run(runs, "gpt", 1, [3.0])
    run.metrics.write_text(f'{{"val/loss": {10**400}, "progress/tokens": 7}}\n5\n{{"val/loss": "x"}}\n{{"val/loss": 2}}\n')
    flops = float(7 * (training_flops(example().model) or 0))
    expected = [{"val/loss": math.inf, "progress/tokens": 7, "progress/flops": flops}, {"val/loss": "x"}, {"val/loss": 2}]
    assert list(find_side("gpt").runs[1].rows) == expected


def test_what_is_no_run(runs: Path) -> None:
    assert "there is no run folder nothing" in sentence(lambda: find_side("nothing"))
    assert "names no run" in sentence(lambda: find_side(","))
    write_run(runs, "gpt", 1, [3.0]).config.write_text("{")
    assert "config.json" in sentence(lambda: find_side("gpt"))
