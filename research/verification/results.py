"""Writes the results of a check as JSON beside the experiment's runs, prints the last line, and gives the exit code."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parallel.files import published
from research.tracking.console import Console
from research.tracking.metrics import finite


def row_fields(row: Any) -> dict[str, Any]:
    """A row, which is a dataclass, as JSON. Its `case` is stored as "cut": the files' readers know it by this name."""
    fields = asdict(row)
    return {"cut": fields.pop("case"), **fields}


def conclude(console: Console, target: Path, results: dict[str, Any], sentence: str, failed: bool) -> int:
    """Writes `results` to the file `target`, prints `sentence` and the path; returns 1 if the check has failed, else 0."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with published(target) as temporary:
        temporary.write_text(json.dumps(finite(results), indent=1, allow_nan=False))
    console.header([("", ""), ("done", f"{sentence} · {os.path.relpath(target)}")])
    return 1 if failed else 0
