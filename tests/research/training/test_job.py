"""What a launch checks before torch is imported: settings that contradict each other, alone and with what W&B takes."""

from pathlib import Path

import pytest

from research import ROOT
from research.cluster.environment import ALONE
from research.config import schema
from research.config.experiment_folder import LoadedExperiment
from research.config.overrides import Options
from research.training.job import dry_run, resolve
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
    job = resolve(loaded, [], ALONE, Options(resume="auto"), [])
    assert [warning.startswith(said) for warning in job.warnings] == [True]
    assert f"\nwarn     {job.warnings[0]}\n" in dry_run(job, "unknown", False)
