"""The trials of a sweep: which there are, that no two train the same, and that Slurm and W&B are given the same launches."""

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from parallel.errors import Mistake
from research import ROOT
from research.ablation import trials
from research.ablation.sweep import DONE, Sweep
from research.cli import sweep
from research.config import overrides
from research.config.experiment_folder import LoadedExperiment, load

GRID = [("optimizer.lr", ("1e-3", "3e-4")), ("model.norm", ("layernorm", "rmsnorm"))]
SHARED = ["--schedule.steps", "100"]


@pytest.fixture(scope="module")
def loaded() -> LoadedExperiment:
    return load(ROOT / "experiments" / "gpt_sotu")


def test_every_combination_has_every_seed_once(loaded: LoadedExperiment) -> None:
    found = trials.trials(loaded, GRID, [7, 8, 9], SHARED, ROOT)
    told = {(trial.experiment.optimizer.lr, trial.experiment.model.norm, trial.experiment.seed) for trial in found}
    assert told == {(lr, norm, seed) for lr in (1e-3, 3e-4) for norm in ("layernorm", "rmsnorm") for seed in (7, 8, 9)} and len(found) == 12
    assert {trial.experiment.schedule.steps for trial in found} == {100}
    assert [trial.seed for trial in found] == [7] * 4 + [8] * 4 + [9] * 4, "a sweep that is stopped has whole seeds"
    assert found[0].label == "optimizer.lr=1e-3 model.norm=layernorm seed=7" and found[0].tags == ("lr:1e-3", "norm:layernorm", "seed:7")


def test_a_sweep_has_the_same_id_however_it_is_written(loaded: LoadedExperiment) -> None:
    def sweep_id(grid: list, seeds: list[int], settings: list[str]) -> str:
        return trials.sweep_id("gpt_sotu", trials.trials(loaded, grid, seeds, settings, ROOT))

    first = sweep_id(GRID, [7, 8], SHARED)
    assert first == sweep_id(GRID[::-1], [8, 7], SHARED) == sweep_id(GRID, [7, 8], [*SHARED, "--parallel.tensor", "2"])
    assert len({first, sweep_id(GRID, [7], SHARED), sweep_id(GRID[:1], [7, 8], SHARED), sweep_id(GRID, [7, 8], [])}) == 4


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        (["optimizer.lrr=1,2"], "optimizer.lrr is not a setting → did you mean optimizer.lr?"),
        (["optimizer.lr=1e-3,x"], "optimizer.lr = 'x' does not work → use a finite number greater than 0"),
        (["optimizer.lr"], "--grid 'optimizer.lr' has no values → write NAME=VALUE,VALUE, such as optimizer.lr=1e-3,3e-4"),
        (["optimizer.lr=1e-3,,1"], "--grid 'optimizer.lr=1e-3,,1' has no values"),
        (["optimizer.lr=1,1"], "--grid optimizer.lr has the value 1 twice → leave one of them out"),
        (["optimizer.lr=1e-3", "optimizer.lr=1"], "--grid optimizer.lr is given twice → write all of its values in one"),
        (["optimizer.lr=1e-3,0.001"], "optimizer.lr=1e-3 seed=7 and optimizer.lr=0.001 seed=7 train the same: only the layout"),
        (["parallel.tensor=1,2"], "parallel.tensor=1 seed=7 and parallel.tensor=2 seed=7 train the same: only the layout"),
        (["seed=1,2"], "--grid seed makes no ablation → use --seeds"),
        (["track.mode=online,offline"], "--grid track.mode makes no ablation → vary a setting that changes what is trained"),
        (["model.num_heads=5"], "model.num_heads = 5"),
        (["data.train=nowhere.txt"], "data.train = 'nowhere.txt'"),
    ],
)
def test_a_grid_that_cannot_be_meant_is_one_sentence(loaded: LoadedExperiment, grid: list[str], said: str) -> None:
    with pytest.raises(Mistake) as raised:
        trials.trials(loaded, [trials.factor(text) for text in grid], [7], [], ROOT)
    assert str(raised.value).startswith(said)


def test_seeds_are_counted_or_listed() -> None:
    assert trials.seeds("3", 1337) == [1337, 1338, 1339] and trials.seeds("4,1,9", 1337) == [4, 1, 9]
    for text, said in (
        ("0", "no number of seeds"),
        ("1,1", "has a seed twice"),
        ("x", "neither a number"),
        ("-1", "neither"),
        ("2000", "1000"),
    ):
        with pytest.raises(Mistake, match=said):
            trials.seeds(text, 1)


def launches(words: list[str]) -> tuple[float, int]:
    """What a launch line trains, as launch.py reads it."""
    experiment, _, _ = overrides.parse(load(ROOT / "experiments" / "gpt_sotu").experiment, words)
    assert experiment.schedule.steps == 100 and experiment.track.group and experiment.track.group.startswith("gpt_sotu-sweep-")
    assert any(tag.startswith("sweep:") for tag in experiment.track.tags)
    return experiment.optimizer.lr, experiment.seed


def test_w_and_b_s_agent_launches_the_same_trials(capsys: pytest.CaptureFixture) -> None:
    """Its agent fills ${args} with --NAME=VALUE of one combination, in the order of the definition."""
    sweep.main(["experiments/gpt_sotu", "--seeds", "2", "--grid", "optimizer.lr=1e-3,3e-4", "--emit", "wandb", "--", *SHARED])
    definition = yaml.safe_load(capsys.readouterr().out)
    assert definition["method"] == "grid" and definition["metric"] == {"name": "val/bits_per_byte", "goal": "minimize"}
    parameters = {name: values["values"] for name, values in definition["parameters"].items()}
    told = set()
    for lr in parameters["optimizer.lr"]:
        for seed in parameters["seed"]:
            words = [f"--optimizer.lr={lr}", f"--seed={seed}"]
            command = [each for word in definition["command"] for each in (words if word == "${args}" else [word])]
            assert command[:3] == ["${env}", "python", "${program}"] and definition["program"] == "experiments/gpt_sotu/launch.py"
            told.add(launches(command[3:]))
    assert told == {(lr, seed) for lr in (1e-3, 3e-4) for seed in (1, 2)}


def test_each_task_of_the_job_array_is_one_trial(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """The script is run by bash, with srun standing for what it would start."""
    emit = ["--emit", "slurm", "--gpus", "2", "--jobs", "3", "--cpu_only"]
    sweep.main(
        ["experiments/gpt_sotu", "--seeds", "2", "--grid", "optimizer.lr=1e-3,3e-4", *emit, "--", *SHARED, "--track.runs", str(tmp_path)]
    )
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-3%3\n" in script and "--ntasks-per-node=2" in script
    (tmp_path / "job.sh").write_text(script)
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\nprintf "%q " "$@"\n')
    srun.chmod(0o755)
    told = set()
    for task in range(4):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "1"}
        words = shlex.split(
            subprocess.run(["bash", tmp_path / "job.sh"], env=environment, capture_output=True, text=True, check=True).stdout
        )
        settings = words[words.index("experiments/gpt_sotu/launch.py") + 1 :]
        assert settings[:2] == ["--resume", "auto"]
        told.add(launches(settings))
    assert told == {(lr, seed) for lr in (1e-3, 3e-4) for seed in (1, 2)}


def test_launches_at_the_same_time_share_no_port(loaded: LoadedExperiment, tmp_path: Path) -> None:
    found = trials.trials(loaded, GRID, [7, 8], ["--track.runs", str(tmp_path)], ROOT)
    planned = Sweep(loaded, found, ROOT, ["/bin/deepspeed", "--num_gpus", "2"])
    commands = [planned.command(trial, jobs=4) for trial in found]
    assert len({tuple(command[1:3]) for command in commands}) == len(found) and all(command[1] == "--master_port" for command in commands)
    assert planned.command(found[0], jobs=1)[:3] == ["/bin/deepspeed", "--num_gpus", "2"]


def test_an_array_without_a_trial_is_refused(loaded: LoadedExperiment, tmp_path: Path) -> None:
    planned = Sweep(loaded, trials.trials(loaded, [], [7], ["--track.runs", str(tmp_path)], ROOT), ROOT, ["python"])
    planned.states[0].status = DONE
    with pytest.raises(Mistake, match="all 1 trials of the sweep are done → there is no job to submit"):
        planned.settings_left()
