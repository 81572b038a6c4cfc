"""Figures for the W&B summary of a run that has ended. It is reached through research/tracking/tracker.py alone, and never fails a command.

Online they go into the run itself. Offline W&B cannot reopen a run: another folder with its id is written, as by a resumed run, which
`wandb sync` joins to the first. The summary of the last one counts there, so it has the run's own last figures too.
"""

from collections.abc import Mapping
from typing import Any

from parallel.files import read_json
from research.config import Experiment, serialization
from research.tracking import metrics, wandb_mirror
from research.tracking.run_folder import RunFolder
from research.tracking.wandb_mirror import RunDescription, bounded


def add(folder: RunFolder, experiment: Experiment, figures: Mapping[str, float]) -> str:
    """A line on where they went; empty for a run that W&B knows nothing of. Twenty seconds at most."""
    if experiment.track.mode == "disabled" or not folder.wandb.is_dir():
        return ""
    opened = bounded(lambda: wandb_mirror.open_run(folder, experiment.track, _about(folder, experiment)), wandb_mirror.START_SECONDS)
    mode, why, run = opened or ("disabled", "it did not start", None)
    if run is None:
        return f"W&B summary not written ({why})"
    values = {**(own(folder) if mode == "offline" else {}), **figures}
    done = bounded(lambda: _put(run, values), wandb_mirror.FINISH_SECONDS + 1)
    bounded(wandb_mirror.end_process, 1.0)
    if not done:
        return "W&B did not take the figures in time → the file above has them"
    return (
        f"W&B summary, online · {run.url}"
        if mode == "online"
        else f"W&B summary, offline ({why}) · later: wandb sync {wandb_mirror._first_line(folder.wandb)}"
    )


def _put(run: Any, values: Mapping[str, Any]) -> bool:
    """True if all was written in time."""
    run.summary.update(dict(values))
    return wandb_mirror.finish_run(run, 0)


def own(folder: RunFolder) -> dict[str, Any]:
    """The run's summary as W&B makes it of metrics.jsonl: the last value of each key, and the lowest where tracking says so."""
    last: dict[str, Any] = {}
    lowest: dict[str, float] = {}
    for row in metrics.read(folder.metrics):
        last |= row
        lowest |= {key: min(row[key], lowest.get(key, row[key])) for key in wandb_mirror.LOWEST if key in row}
    return last | {key: {"min": value, "last": last[key]} for key, value in lowest.items()}


def _about(folder: RunFolder, experiment: Experiment) -> RunDescription:
    """As when it was trained."""
    run = read_json(folder.run)
    deepspeed = read_json(folder.deepspeed) if folder.deepspeed.is_file() else {}
    told = (run.get("commit"), bool(run.get("dirty")))
    return RunDescription(
        serialization.resolved(experiment), deepspeed, *told, family=folder.name, tags=[str(run["layout"]), str(run["precision"])]
    )
