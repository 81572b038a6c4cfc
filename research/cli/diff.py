"""`python -m research diff X Y`: what differs between two experiments, runs or checkpoints, in any mix. Imports no torch."""

import json
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from parallel.text import printable
from research.ablation import difference
from research.ablation.difference import Difference, Side
from research.cli.json_output import add_json_option, print_json
from research.cli.verbs import Parser
from research.config.diff import Change
from research.config.experiment_folder import VARIANTS
from research.config.sources import TRAIN, Source, describe_texts
from research.tracking.console import Console, show_tables

WHAT = """Shows the settings that differ and affect results, those that affect none, variant.py as a unified diff, and where the two come
from: the fingerprint of the data, the commit, the code, the versions. Each of X and Y is an experiment's folder, a run or a checkpoint.
Of a folder, the code and the versions are those of this checkout; its data has a fingerprint once it has been trained on."""
LONGEST = 400
"""The most characters of a value in a table."""
MOST_LINES = 2000
"""The most lines of a variant.py's difference that are shown."""
ORIGINS = {"data": "data (SHA-256)", "code": "code (SHA-256)"}


def main(argv: list[str]) -> None:
    """Prints the tables, or JSON. With --exit-code, the exit code is 1 if something that affects results differs."""
    parser = Parser("diff", WHAT)
    for name in ("x", "y"):
        parser.add_argument(name, metavar=name.upper(), help="experiments/NAME, a run's folder, name or title, or a checkpoint's folder")
    parser.add_argument("--exit-code", dest="exit_code", action="store_true", help="exit with 1 if something that affects results differs")
    add_json_option(parser, "what differs")
    arguments = parser.parse_args(argv)
    x, y = difference.find(arguments.x), difference.find(arguments.y)
    found = difference.compare(x, y)
    if arguments.json:
        print_json(as_json(x, y, found))
    else:
        show(x, y, found)
    if arguments.exit_code and found.affects_results:
        raise SystemExit(1)


def show(x: Side, y: Side, found: Difference) -> None:
    """Prints what differs; a line for each part in which nothing does."""
    console = Console()
    console.header([("", f"{x.label} ({x.kind}) → {y.label} ({y.kind})")])
    known = "data, code and versions are" if "data" in {*x.origin, *y.origin} else "code and versions are"
    parts = (
        ("affects results", found.science, "no setting that affects results differs"),
        ("affects no result", found.plumbing, "no other setting differs"),
        ("comes from", found.origin, f"{known} the same"),
    )
    for title, changes, otherwise in parts:
        if changes:
            show_tables([table(title, changes, x.label, y.label)])
        else:
            console.header([("same", otherwise)])
    if found.variant and not any(name == VARIANTS for name, _, _ in found.science):
        console.header([(VARIANTS, "differs, and no setting that affects results names any of it")])
    shown = found.variant[:MOST_LINES]
    left = len(found.variant) - len(shown)
    console.lines([*map(printable, shown), *([f"and {left:,} more lines"] if left else [])])


def table(title: str, changes: Sequence[Change], x: str, y: str) -> Table:
    """A row for each change."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    made.add_column(title)
    for label in (x, y):
        made.add_column(printable(label)[:40], overflow="fold")
    for name, then, now in changes:
        made.add_row(ORIGINS.get(name, name), *(shown(name, value) for value in (then, now)))
    return made


def shown(name: str, value: Any) -> str:
    """A value as a table shows it: the sources of data.train in words, – for what is not known or not set."""
    if value is None:
        return "–"
    if name == TRAIN and not isinstance(value, str):
        value = describe_texts([Source(**entry) if isinstance(entry, dict) else entry for entry in value])
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def as_json(x: Side, y: Side, found: Difference) -> dict[str, Any]:
    """What --json prints."""
    changes = {
        part: [{"name": name, "x": then, "y": now} for name, then, now in rows]
        for part, rows in (("science", found.science), ("plumbing", found.plumbing), ("origin", found.origin))
    }
    sides = {name: {"label": side.label, "kind": side.kind, **side.origin} for name, side in (("x", x), ("y", y))}
    return {**sides, "affects_results": found.affects_results, **changes, "variant": "\n".join(found.variant) or None}
