"""`--resume`: which run goes on, from which checkpoint, and whether it may with today's settings. Decided before torch is imported."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel import checkpoint_folder
from parallel.checkpoint_folder import MANIFEST
from parallel.checkpoint_manifest import MAX_BYTES, parse
from parallel.errors import Mistake
from research import config, run_folder
from research.changes import Change, allowed
from research.config import Experiment
from research.experiment import VARIANTS, variant_names
from research.run_folder import FINISHED, IMPORTED, RUNNING, RunFolder

AUTO, NEVER = "auto", "never"


@dataclass(frozen=True)
class Resume:
    """A run that goes on."""

    folder: RunFolder
    checkpoint: Path
    facts: dict[str, Any]
    """What the checkpoint's manifest says of the run."""
    changed: list[Change]
    """Settings that are others than when it was saved, all of them harmless."""

    @property
    def step(self) -> int:
        """Optimizer steps taken before the checkpoint."""
        return self.facts["step"]


def find(asked: str, experiment: Experiment, source: Path, runs: Path) -> Resume | None:
    """The run that `asked` (auto, never, a run, a checkpoint) names; None where a new one begins. Rank 0 only.

    `source` is the experiment's folder, `runs` what holds NAME/ID/. A Mistake where the run cannot go on as asked.
    """
    if asked == NEVER:
        return None
    folder, checkpoint = _newest(runs, source.name) if asked == AUTO else _named(asked, runs)
    if folder is None or checkpoint is None:
        return None
    run = run_folder.read_json(folder.run)
    _refuse_other_experiment(folder, source)
    _refuse_running(folder, run)
    _refuse_imported(folder, run)
    if asked != AUTO and run_folder.status(run) == FINISHED and experiment.schedule.steps <= _facts(checkpoint)["step"]:
        steps = experiment.schedule.steps
        raise Mistake(
            f"{folder.title} has taken all of its {steps} steps → add --schedule.steps {2 * steps} to go on, or leave --resume out"
        )
    _refuse_other_variant(folder, source, experiment)
    return Resume(folder, checkpoint, _facts(checkpoint), allowed(config.load(folder.config), experiment, folder.title))


def _newest(runs: Path, name: str) -> tuple[RunFolder | None, Path | None]:
    """The newest run of the experiment that has a checkpoint, unless it is finished."""
    found = [(run_folder.read_json(folder.run), folder) for folder in run_folder.every(runs) if folder.name == name]
    for run, folder in sorted(found, key=lambda pair: str(pair[0].get("started")), reverse=True):
        if checkpoint_folder.newest_complete(folder.checkpoints) is None or run_folder.status(run) == IMPORTED:
            continue
        if run_folder.status(run) == FINISHED:
            return None, None
        return folder, checkpoint_folder.latest(folder.checkpoints)
    return None, None


def _named(handle: str, runs: Path) -> tuple[RunFolder, Path]:
    """A checkpoint's folder, or whatever names a run."""
    path = Path(handle)
    if (path / MANIFEST).is_file():
        path = path.resolve()
        folder = RunFolder(path.parent.parent)
        if not folder.run.is_file():
            raise Mistake(f"{handle} is a checkpoint outside of a run's folder → name one in runs/NAME/ID/checkpoints")
        return folder, path
    folder = run_folder.find(handle, runs)
    return folder, checkpoint_folder.latest(folder.checkpoints)


def _facts(checkpoint: Path) -> dict[str, Any]:
    """What the manifest says, its tables left out. It may come from a stranger."""
    path = checkpoint / MANIFEST
    try:
        with path.open("rb") as file:
            return parse(file.read(MAX_BYTES)).facts
    except (OSError, ValueError) as error:
        raise Mistake(f"{path} is not the manifest of a checkpoint: {error} → use another checkpoint of the run") from None


def _refuse_other_experiment(folder: RunFolder, source: Path) -> None:
    if folder.name != source.name:
        raise Mistake(
            f"{folder.title} is a run of {folder.name}, this is {source.name} → launch experiments/{folder.name} to go on with it"
        )


def _refuse_running(folder: RunFolder, run: dict[str, Any]) -> None:
    if run_folder.status(run) == RUNNING and run.get("host") == run_folder.hostname():
        raise Mistake(f"{folder.title} is running (process {run['pid']}) → wait for its end, or end it: kill -USR1 {run['pid']}")


def _refuse_imported(folder: RunFolder, run: dict[str, Any]) -> None:
    if run_folder.status(run) == IMPORTED:
        raise Mistake(f"{folder.title} was imported, not trained: it holds weights alone → leave --resume out: init_from begins with them")


def _refuse_other_variant(folder: RunFolder, source: Path, experiment: Experiment) -> None:
    """A changed class is a changed model, which no setting shows."""
    if not variant_names(experiment.model):
        return
    then, now = (_digest(place / VARIANTS) for place in (folder.source, source))
    if then != now:
        raise Mistake(
            f"{source / VARIANTS} is not what {folder.title} was trained with (SHA-256 {then[:12]} → {now[:12]}) → "
            f"put {folder.source / VARIANTS} back, or begin a run of its own"
        )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
