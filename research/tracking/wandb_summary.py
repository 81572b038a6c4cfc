"""Adds figures to the Weights & Biases summary of a run that has ended. Called by `evaluate`; never fails a command.

Online they are added to the run itself. Offline, W&B cannot reopen a run: another folder with the run's id is written, as by a resumed
run, which `wandb sync` joins to the first. The summary of the last folder counts there, so it also holds the run's own last figures. The
folder gets a name that `wandb leet` does not list, because it has no rows: that goes on showing the run.
"""

from collections.abc import Mapping
from pathlib import Path

from parallel.files import read_json
from research.tracking import wandb_client, wandb_record
from research.tracking.acquire_lock import is_held
from research.tracking.format import short_path
from research.tracking.run_folder import RunFolder


def add(folder: RunFolder, figures: Mapping[str, float]) -> str:
    """Returns a line on where the figures went; empty for a run that is not to be tracked. A server has ten seconds to take them."""
    mode = read_json(folder.config)["track"]["mode"] if folder.config.is_file() else "disabled"
    if mode == "disabled" or not folder.wandb.is_dir():
        return ""
    if (held := is_held(folder.lock)) is not False:  # its holder writes RUN/wandb itself; None: it cannot be seen from here, but may live
        used = "is in use" if held else "may be in use on another host"
        return f"W&B summary not written: the run {used} → python -m research track {folder.shown} writes it when the run has ended"
    if not wandb_record.files_of(folder):
        return f"W&B has no record of this run → python -m research track {folder.shown} writes one, with these figures"
    try:
        opened = wandb_client.open_run(folder, wandb_client.describe(folder), mode, adds_to_a_run=True)
        if opened.run is None:
            return f"W&B summary not written ({opened.why})"
        url = opened.run.url if opened.mode == "online" else None
        opened.run.summary.update({**(wandb_record.summary(folder) if opened.mode == "offline" else {}), **figures})
        place = Path(opened.run.dir).parent
        done = wandb_client.finish_run(opened.run, 0)
        wandb_client.call_with_timeout(wandb_client.end_process, 1.0)
        if opened.mode == "offline":
            place.rename(place.with_name(place.name.replace("run", "summary", 1)))
    except Exception as error:  # W&B is a mirror: whatever it raises must not reach the command
        return f"W&B summary not written ({wandb_client.reason(error)}) → python -m research track {folder.shown} writes it later"
    if not done:
        return "W&B did not take the figures in time → the file above has them"
    if url:
        return f"W&B summary, online · {url}"
    return f"W&B summary, offline ({opened.why}) · later: wandb sync {short_path(folder.wandb)}"
