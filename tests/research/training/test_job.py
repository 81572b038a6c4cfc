"""What a launch checks before torch is imported: settings that contradict each other, alone and with what W&B takes."""

from pathlib import Path

import pytest

from research import ROOT
from research.cluster.environment import ALONE
from research.config import schema, serialization
from research.config.experiment_folder import LoadedExperiment
from research.config.overrides import Options
from research.tracking import run_folder
from research.tracking.run_folder import INTERRUPTED
from research.training.job import describe, dry_run, resolve
from research.training.resume import AUTO
from tests.parallel.helpers.checkpoints import save
from tests.research.helpers.example import example, sentence


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": {"lr": 1e-4}}, "optimizer.min_lr = 0.0003 is above optimizer.lr = 0.0001"),
        ({"track": schema.Track(project="a/b")}, "track.project = 'a/b': W&B takes no / in the name of a project"),
    ],
)
def test_a_contradiction_is_refused_in_a_new_run_and_a_warning_in_one_that_goes_on(changes: dict, said: str, tmp_path: Path) -> None:
    """A run that has begun with such settings may not change all of them, so that refusing it would be its end."""
    experiment = example(**changes)
    experiment.track.runs = str(tmp_path)
    loaded = LoadedExperiment(experiment, ROOT / "experiments" / "gpt_sotu", "gpt_sotu")
    assert sentence(lambda: resolve(loaded, [], ALONE, Options(), [])).startswith(said)
    assert sentence(lambda: resolve(loaded, [], ALONE, Options(resume=AUTO), [])).startswith(said)  # there is none yet

    folder = run_folder.create(tmp_path, "gpt_sotu")
    serialization.save(experiment, folder.config)
    save(folder.checkpoints / "step_000001")
    run_folder.start(folder, layout="", precision="fp32", steps=2)
    run_folder.end(folder, INTERRUPTED)
    job = resolve(loaded, [], ALONE, Options(resume=AUTO), [])
    assert job.resume and job.resume.folder == folder
    assert [warning.startswith(said) for warning in job.warnings] == [True]
    assert f"\nwarn     {job.warnings[0]}\n" in dry_run(job, "unknown", False)


def test_the_machine_line_names_the_gpu_and_deterministic_kernels() -> None:
    lines = []
    for deterministic in (False, True):
        loaded = LoadedExperiment(example(deterministic=deterministic), ROOT / "experiments" / "gpt_sotu", "gpt_sotu")
        job = resolve(loaded, [], ALONE, Options(), [])
        lines.append(dict(describe(job, "NVIDIA H200, 150.1 GB", ["nccl 2.27.5", "gloo"]))["machine"])
    assert lines[0].startswith("1 node × 1 rank · NVIDIA H200, 150.1 GB, ") and lines[0].endswith(" · nccl 2.27.5 · gloo")
    assert lines[1] == f"{lines[0]} · deterministic kernels"


def test_ramps_are_said_and_tokens_are_those_that_are_read() -> None:
    """Of 300 steps the first 100 have 8 sequences, and the first 50 half of their tokens."""
    schedule = {"batch_ramp": (8, 8, 800), "length_ramp": (64, 64, 400)}
    loaded = LoadedExperiment(example(schedule=schedule), ROOT / "experiments" / "gpt_sotu", "gpt_sotu")
    job = resolve(loaded, [], ALONE, Options(), [])
    assert dict(describe(job))["batch"] == (
        "16 sequences = 8 micro × 2 accumulated × 1 data · 2,048 tokens a step · from 8 sequences on, all of them from step 101 · "
        "of 64 tokens at first, 128 from step 51"
    )
    assert [job.layout.tokens_before(step) for step in (1, 50, 100, 300)] == [512, 25_600, 76_800, 486_400]
    assert "\nschedule 300 steps = 486.4 k tokens" in dry_run(job, "unknown", False)
