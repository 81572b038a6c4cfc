"""`python -m research runs`: lists the runs on this disk, one per line. In a pipe the columns are tab-separated; `--json` for programs."""

import contextlib
import datetime
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from parallel.files import read_json
from research.cli.verbs import Parser
from research.tracking import format as fmt
from research.tracking import metrics, run_folder
from research.tracking.run_folder import RunFolder

COLUMNS = ("name", "id", "started", "layout", "precision", "steps", "bits/byte", "status")
COLOURS = {"running": "cyan", "finished": "green", "interrupted": "yellow", "failed": "red", "died": "red"}
RIGHT_ALIGNED = ("steps", "bits/byte")


def main(argv: list[str]) -> None:
    """Prints the table of runs, newest last."""
    parser = Parser("runs", "List the runs, newest last.")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="the folder that holds NAME/ID/ (default: runs)")
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    arguments = parser.parse_args(argv)

    runs = [summary for folder in run_folder.every(arguments.root) if (summary := summarise(folder)) is not None]
    runs.sort(key=lambda run: (run["started"], run["id"]))
    if arguments.json:
        print(json.dumps(runs, indent=2, ensure_ascii=False))
    elif not runs:
        print(f"no runs in {arguments.root} yet · deepspeed experiments/gpt_sotu/launch.py makes one")
    elif sys.stdout.isatty():
        Console().print(table(runs))
    else:
        print("\n".join("\t".join(row) for row in [COLUMNS, *map(cells, runs)]))


def summarise(folder: RunFolder) -> dict[str, Any] | None:
    """One run as `--json` prints it; None if its run.json cannot be read."""
    try:
        run = read_json(folder.run)
        status = run_folder.status(run, folder)
    except (OSError, ValueError, AttributeError):
        return None
    last = metrics.last(folder.metrics, ("progress/step", "val/bits_per_byte"))
    bits = last.get("val/bits_per_byte")
    return {
        "name": folder.name,
        "id": folder.id,
        "folder": str(folder.path),
        "started": str(run.get("started", "")),
        "ended": run.get("ended"),
        "layout": run.get("layout", ""),
        "precision": run.get("precision", ""),
        "steps_done": last.get("progress/step", 0),
        "steps_planned": run.get("steps"),
        "bits_per_byte": None if fmt.missing(bits) else bits,  # JSON has no nan
        "status": status,
    }


def cells(run: dict[str, Any]) -> tuple[str, ...]:
    """The run as one row of COLUMNS."""
    started = run["started"]
    with contextlib.suppress(ValueError):  # UTC as this machine's date and minute: 2026-01-31 12:00
        started = datetime.datetime.fromisoformat(started).astimezone().strftime("%Y-%m-%d %H:%M")
    steps = f"{run['steps_done']}/{run['steps_planned'] or '?'}"
    return run["name"], run["id"], started, run["layout"], run["precision"], steps, fmt.loss(run["bits_per_byte"]), run["status"]


def table(runs: list[dict[str, Any]]) -> Table:
    """The runs for a terminal: no box, the status coloured."""
    drawn = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in COLUMNS:
        drawn.add_column(column, justify="right" if column in RIGHT_ALIGNED else "left", no_wrap=column != "layout")
    for run in runs:
        *front, status = cells(run)
        drawn.add_row(*map(Text, front), Text(status, COLOURS.get(status, "")))
    return drawn
