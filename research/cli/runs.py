"""`python -m research runs`: lists the runs on this disk and tells them apart. In a pipe the columns are tab-separated.

In a terminal, the columns that do not fit into its width go to further lines of the same run: nothing is cut off.
"""

import contextlib
import datetime
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from parallel.checkpoint.folder import newest_complete
from parallel.errors import Mistake, nearest
from research.cli.json_output import print_json
from research.cli.run_differences import DESCRIPTIVE, Settings, differing, settings_of
from research.cli.verbs import Parser
from research.config.diff import belongs
from research.tracking import format as fmt
from research.tracking import metrics, run_folder, run_record, run_status
from research.tracking.console import TerminalConsole
from research.tracking.run_folder import RunFolder

SORTED_BY = {
    "run": "title",
    "status": "status",
    "steps": "steps_done",
    "tokens": "tokens",
    "bits/byte": "bits_per_byte",
    "seed": "seed",
    "started": "started",
    "precision": "precision",
    "layout": "layout",
    "differs": "differs",
}
"""Column -> the key of `--json` that it is sorted by."""
COLUMNS = tuple(SORTED_BY)
OWN_COLUMN = ("seed", "precision", "parallel", "schedule.steps")
"""Settings, or groups of them, that another column shows."""
LAST = ("progress/step", "progress/tokens", "progress/seconds", "train/loss", "val/bits_per_byte")
UNREADABLE = "unreadable"
"""The status of a run whose folder is damaged, or is no run's: `differs` says what is wrong."""
COLOURS = {"running": "cyan", "finished": "green", "interrupted": "yellow", "failed": "red", "died": "red", UNREADABLE: "red"}
LONGEST_CELL, LONGEST_ENTRY, MOST_ENTRIES = 120, 200, 50
"""The most characters of a cell, and of an entry of `differs`, and the most entries: a run's files may be a stranger's."""
RIGHT_ALIGNED = ("steps", "tokens", "bits/byte", "seed")
INDENT, GAP = "    ", "  "
WHAT = """List the runs, newest last: how far they are, how good they are, and what tells them apart. `differs` shows each setting that
the command line changed, old → new, and each setting of config.py that runs of the same experiment do not share."""


def main(argv: list[str]) -> None:
    """Prints the table of runs, newest last."""
    parser = Parser("runs", WHAT)
    parser.add_argument("--root", type=Path, default=Path("runs"), help="the folder that holds NAME/ID/ (default: runs)")
    parser.add_argument("--sort", metavar="COLUMN", default="started", help=f"sort by {', '.join(COLUMNS)} (default: started)")
    parser.add_argument("--reverse", action="store_true", help="largest or newest first")
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table, with more about each run")
    arguments = parser.parse_args(argv)
    if arguments.sort not in SORTED_BY:
        near = nearest(arguments.sort, COLUMNS)
        raise Mistake(f"there is no column {arguments.sort} → " + (f"did you mean {near}?" if near else f"use {', '.join(COLUMNS)}"))

    found = [(folder, summarise(folder)) for folder in run_folder.every(arguments.root)]
    known = [({"status": run["status"]}, folder) for folder, run in found]
    for (_, run), status in zip(found, run_status.statuses(known), strict=True):  # all heartbeats that must be watched, at once
        run["status"] = status
    tell_apart(found)
    runs = in_order([run for _, run in found], SORTED_BY[arguments.sort], arguments.reverse)
    if arguments.json:
        print_json(runs)
    elif not runs:
        print(f"no runs in {arguments.root} yet · deepspeed experiments/gpt_sotu/launch.py makes one")
    elif sys.stdout.isatty():
        console = TerminalConsole(highlight=False, markup=False)
        for line in lines([cells(run) for run in runs], console.width):
            console.print(line, soft_wrap=True)
    else:
        print("\n".join("\t".join(row) for row in [COLUMNS, *map(cells, runs)]))


def summarise(folder: RunFolder) -> dict[str, Any]:
    """One run as `--json` prints it, `status` as run.json has it.

    One that cannot be read has the status UNREADABLE and a reason, and does not end the list.
    """
    try:
        run, last = run_record.read(folder), metrics.last(folder.metrics, LAST)
        checkpoint = newest_complete(folder.checkpoints)
        status, settings = run["status"], settings_of(folder)
    except Exception as error:  # whatever a folder that somebody else has made leads to
        reason = str(error) if isinstance(error, (Mistake, OSError)) else f"{type(error).__name__}: {error}"
        run, last, checkpoint, status, settings = {"reason": reason.partition(" → ")[0]}, {}, None, UNREADABLE, {}
    last = {key: value for key, value in last.items() if _is_number(value)}  # JSON has no nan
    return {
        "name": folder.name,
        "id": folder.id,
        "title": folder.title,
        "folder": str(folder.path),
        "status": status,
        "reason": run.get("reason"),
        "started": run.get("started", ""),
        "ended": run.get("ended"),
        "seconds": last.get("progress/seconds"),
        "layout": run.get("layout", ""),
        "precision": run.get("precision", ""),
        "seed": settings.get("seed"),
        "steps_done": last.get("progress/step", 0),
        "steps_planned": run.get("steps"),
        "tokens": last.get("progress/tokens", 0),
        "train_loss": last.get("train/loss"),
        "bits_per_byte": last.get("val/bits_per_byte"),
        "checkpoint": None if checkpoint is None else checkpoint.name,
        "commit": run.get("commit"),
        "dirty": run.get("dirty"),
        "overrides": run.get("overrides", []),
    }


def _is_number(value: Any) -> bool:
    """Whether a value of metrics.jsonl is a finite number that a table can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)


def tell_apart(runs: Sequence[tuple[RunFolder, dict[str, Any]]]) -> None:
    """Adds `differs` to each run: what the command line changed, and the settings that runs of its experiment do not share."""
    unreadable = [run for _, run in runs if run.get("status") == UNREADABLE]
    settings = {folder.title: {} if run in unreadable else settings_of(folder) for folder, run in runs}
    for folder, run in runs:
        names = differing([settings[other.title] for other, _ in runs if other.name == folder.name])
        run["differs"] = [run["reason"]] if run in unreadable else differences(run["overrides"], settings[folder.title], names)


def differences(overrides: Sequence[Sequence[str]], settings: Settings, names: Sequence[str]) -> list[str]:
    """['optimizer.lr 0.003 → 0.001', 'model.norm rmsnorm', …]: `names`, which tell the runs apart, and then all other overrides."""
    changed = {name: f"{name} {old} → {new}" for name, old, new in overrides if not belongs(name, DESCRIPTIVE)}
    telling = {name: changed.get(name, f"{name} {settings[name]}") for name in names if name in settings}
    return [text for name, text in (telling | changed).items() if not belongs(name, OWN_COLUMN)]


def in_order(runs: list[dict[str, Any]], key: str, reverse: bool) -> list[dict[str, Any]]:
    """The runs sorted by one key of theirs, those of equal keys by their start; runs without a value come last."""
    runs = sorted(runs, key=lambda run: (run["started"], run["id"]))
    known = sorted((run for run in runs if run[key] is not None), key=lambda run: run[key], reverse=reverse)
    return known + [run for run in runs if run[key] is None]


def cells(run: dict[str, Any]) -> tuple[str, ...]:
    """The run as one row of COLUMNS."""
    started = run["started"]
    with contextlib.suppress(ValueError, OverflowError, OSError):  # UTC as this machine's date and minute: 2026-01-31 12:00
        started = datetime.datetime.fromisoformat(started).astimezone().strftime("%Y-%m-%d %H:%M")
    shown = {
        **{key: run[key] for key in ("status", "precision", "layout")},
        "run": run["title"],
        "steps": f"{run['steps_done']}/{run['steps_planned'] or '?'}",
        "tokens": fmt.count(run["tokens"]),
        "bits/byte": fmt.loss(run["bits_per_byte"]),
        "seed": "–" if run["seed"] is None else str(run["seed"]),
        "started": started,
        "differs": ", ".join(entries_of(run)),
    }
    return tuple(text if column == COLUMNS[-1] else fmt.one_line(text, LONGEST_CELL) for column in COLUMNS for text in [shown[column]])


def entries_of(run: dict[str, Any]) -> list[str]:
    """The entries of `differs` as they are shown: each on one line, and cut, as is their number."""
    entries, left = run["differs"][:MOST_ENTRIES], len(run["differs"]) - MOST_ENTRIES
    return [*(fmt.one_line(entry, LONGEST_ENTRY) for entry in entries), *([f"and {left:,} more"] if left > 0 else [])]


def lines(rows: Sequence[Sequence[str]], width: int) -> list[Text]:
    """The table for a terminal of this width: a head, and for each run one line, or several of which all but the first are indented.

    The columns fill the lines in order; where a column stands is the same for all runs. The last one is wrapped between its entries.
    """
    table = [COLUMNS, *rows]
    widths = [max(cell_len(row[i]) for row in table) for i in range(len(COLUMNS))]
    groups: list[list[int]] = [[]]
    for i in range(len(COLUMNS)):
        used = sum(widths[j] + len(GAP) for j in groups[-1]) + len(INDENT) * (len(groups) > 1)
        if groups[-1] and used + widths[i] > width:
            groups.append([])
        groups[-1].append(i)
    return [line for n, row in enumerate(table) for line in _lines_of(row, n == 0, groups, widths, width)]


def _lines_of(row: Sequence[str], is_head: bool, groups: Sequence[Sequence[int]], widths: Sequence[int], width: int) -> list[Text]:
    """The lines of one run, or of the head."""
    found = []
    for n, group in enumerate(groups):
        line = Text(INDENT if n else "", "dim" if is_head else "")
        for i in group:
            padding = " " * (widths[i] - cell_len(row[i]))
            style = COLOURS.get(row[i], "") if COLUMNS[i] == "status" and not is_head else ""
            line.append(f"{padding}{row[i]}" if COLUMNS[i] in RIGHT_ALIGNED else f"{row[i]}{padding}", style).append(GAP)
        line.rstrip()
        found.append(line)
    if cell_len(found[-1].plain) > width and groups[-1] == [len(COLUMNS) - 1]:
        found[-1:] = [Text(f"{INDENT}{text}") for text in _wrapped(row[-1].split(", "), width - len(INDENT))]
    return [line for line in found if line.plain.strip()]


def _wrapped(entries: Sequence[str], width: int) -> list[str]:
    """The entries joined by commas, as many on a line as fit."""
    wrapped: list[str] = []
    for entry in entries:
        if wrapped and cell_len(f"{wrapped[-1]}, {entry}") <= width:
            wrapped[-1] += f", {entry}"
        else:
            wrapped[-1:] = [f"{wrapped[-1]},"] if wrapped else []
            wrapped.append(entry)
    return wrapped
