"""A Weights & Biases run of the job type `compare`: the table of a comparison, its verdicts and its pictures. Never fails a command."""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.tracking import wandb_client
from research.tracking.format import short_path
from research.tracking.run_folder import RunFolder
from research.tracking.wandb_client import RunDescription

JOB_TYPE = "compare"
SECONDS = 60.0
"""How long a server may take for the table and the pictures."""


@dataclass(frozen=True)
class ComparisonFolder(RunFolder):
    """The folder of a comparison's files, in which W&B keeps its own."""

    label: str = JOB_TYPE

    @property
    def title(self) -> str:
        """What W&B calls the run."""
        return self.label


def write(
    folder: Path,
    name: str,
    project: str,
    config: Mapping[str, Any],
    table: tuple[Sequence[str], Sequence[Sequence[Any]]],
    summary: Mapping[str, Any],
    pictures: Mapping[str, Path],
    mode: str,
) -> str:
    """Writes a new W&B run and returns a line on where it is. `table`: its columns and rows."""
    label = f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)[:80]}-{secrets.token_hex(3)}"
    place = ComparisonFolder(folder, label)
    place.wandb_json.unlink(missing_ok=True)  # it would make this the run of an earlier comparison
    description = RunDescription(config, {}, None, False, project=project, group=JOB_TYPE, tags=[JOB_TYPE], job_type=JOB_TYPE)
    try:
        opened = wandb_client.open_run(place, description, mode, finish_seconds=SECONDS)
        if (run := opened.run) is None:
            return f"W&B {opened.mode} ({opened.why})"
        taken = wandb_client.call_with_timeout(lambda: _log(run, table, summary, pictures), SECONDS)
        done = bool(taken) and wandb_client.finish_run(run, 0)
        wandb_client.call_with_timeout(wandb_client.end_process, 1.0)
    except Exception as error:  # W&B is a mirror: whatever it raises must not reach the command
        return f"W&B run not written ({wandb_client.reason(error)})"
    if not done:
        return "W&B did not take the comparison in time → the files have it"
    if opened.mode == "online":
        return f"W&B online · {run.url}"
    return f"W&B offline ({opened.why}) · later: wandb sync {short_path(place.wandb)}"


def _log(run: Any, table: tuple[Sequence[str], Sequence[Sequence[Any]]], summary: Mapping[str, Any], pictures: Mapping[str, Path]) -> bool:
    import wandb

    columns, rows = table
    images = {name: wandb.Image(str(path)) for name, path in pictures.items()}
    run.log({"differences": wandb.Table(columns=[*columns], data=[[*row] for row in rows]), **images})
    run.summary.update(dict(summary))
    return True
