"""Adds figures to the Weights & Biases summary of a run that has ended. Called by `evaluate`; never fails a command.

Online they are added to the run itself. Offline, W&B cannot reopen a run: another folder with the run's id is written, as by a resumed
run, which `wandb sync` joins to the first. The summary of the last folder counts there, so it also holds the run's own last figures.
"""

from collections.abc import Mapping
from typing import Any

from parallel.files import read_json
from research.tracking import metrics, wandb_mirror
from research.tracking.format import short_path
from research.tracking.run_folder import RunFolder
from research.tracking.wandb_mirror import RunDescription, call_with_timeout


def add(folder: RunFolder, figures: Mapping[str, float]) -> str:
    """Returns a line on where the figures went; empty for a run that W&B does not know. Takes twenty seconds at most."""
    if not folder.wandb.is_dir():
        return ""
    config = read_json(folder.config)
    mode = config["track"]["mode"]
    if mode == "disabled":
        return ""

    def start() -> tuple[str, str, Any]:
        return wandb_mirror.open_run(folder, _description(folder, config), mode)

    mode, why, run = call_with_timeout(start, wandb_mirror.START_SECONDS) or ("disabled", "it did not start", None)
    if run is None:
        return f"W&B summary not written ({why})"
    values = {**(own(folder) if mode == "offline" else {}), **figures}

    def write() -> bool:
        run.summary.update(values)
        return wandb_mirror.finish_run(run, 0)

    done = call_with_timeout(write, wandb_mirror.FINISH_SECONDS + 1)
    call_with_timeout(wandb_mirror.end_process, 1.0)
    if not done:
        return "W&B did not take the figures in time → the file above has them"
    if mode == "online":
        return f"W&B summary, online · {run.url}"
    return f"W&B summary, offline ({why}) · later: wandb sync {short_path(folder.wandb)}"


def own(folder: RunFolder) -> dict[str, Any]:
    """The run's summary as W&B makes it from metrics.jsonl: each key's last value; for validation losses the lowest, too."""
    last: dict[str, Any] = {}
    lowest: dict[str, float] = {}
    for row in metrics.read(folder.metrics):
        last |= row
        lowest |= {key: min(row[key], lowest.get(key, row[key])) for key in wandb_mirror.LOWEST if key in row}
    return last | {key: {"min": value, "last": last[key]} for key, value in lowest.items()}


def _description(folder: RunFolder, config: Mapping[str, Any]) -> RunDescription:
    """The description that the run had while it was trained, from the files of its folder."""
    run = read_json(folder.run)
    return RunDescription(
        config,
        read_json(folder.deepspeed) if folder.deepspeed.is_file() else {},
        run.get("commit"),
        bool(run.get("dirty")),
        project=config["track"]["project"],
        group=config["track"]["group"] or folder.name,
        tags=list(dict.fromkeys([str(run["layout"]), str(run["precision"]), *config["track"].get("tags", [])])),
        job_type=config["track"].get("job_type"),
    )
