"""Figures for the W&B summary of a run that has ended. It is reached through research/tracking.py alone, and never fails a command.

Online they go into the run itself. Offline W&B cannot reopen a run: another folder with its id is written, as by a resumed run, which
`wandb sync` joins to the first. The summary of the last one counts there, so it has the run's own last figures too.
"""

from collections.abc import Mapping
from typing import Any

from research import config, metrics, run_folder, tracking
from research.about import About
from research.bounded import bounded
from research.config import Experiment
from research.run_folder import RunFolder


def add(folder: RunFolder, experiment: Experiment, figures: Mapping[str, float]) -> str:
    """A line on where they went; empty for a run that W&B knows nothing of. Twenty seconds at most."""
    if experiment.track.mode == "disabled" or not folder.wandb.is_dir():
        return ""
    opened = bounded(lambda: tracking.open_run(folder, experiment.track, _about(folder, experiment)), tracking.START_SECONDS)
    mode, why, run = opened or ("disabled", "it did not start", None)
    if run is None:
        return f"W&B summary not written ({why})"
    values = {**(own(folder) if mode == "offline" else {}), **figures}
    done = bounded(lambda: _put(run, values), tracking.FINISH_SECONDS + 1)
    bounded(tracking.end_process, 1.0)
    if not done:
        return "W&B did not take the figures in time → the file above has them"
    return (
        f"W&B summary, online · {run.url}"
        if mode == "online"
        else f"W&B summary, offline ({why}) · later: wandb sync {tracking.short(folder.wandb)}"
    )


def _put(run: Any, values: Mapping[str, Any]) -> bool:
    """True if all was written in time."""
    run.summary.update(dict(values))
    return tracking.finish_run(run, 0)


def own(folder: RunFolder) -> dict[str, Any]:
    """The run's summary as W&B makes it of metrics.jsonl: the last value of each key, and the lowest where tracking says so."""
    last: dict[str, Any] = {}
    lowest: dict[str, float] = {}
    for row in metrics.read(folder.metrics):
        last |= row
        lowest |= {key: min(row[key], lowest.get(key, row[key])) for key in tracking.LOWEST if key in row}
    return last | {key: {"min": value, "last": last[key]} for key, value in lowest.items()}


def _about(folder: RunFolder, experiment: Experiment) -> About:
    """As when it was trained."""
    run = run_folder.read_json(folder.run)
    deepspeed = run_folder.read_json(folder.deepspeed) if folder.deepspeed.is_file() else {}
    told = (run.get("commit"), bool(run.get("dirty")))
    return About(config.resolved(experiment), deepspeed, *told, family=folder.name, tags=[str(run["layout"]), str(run["precision"])])
