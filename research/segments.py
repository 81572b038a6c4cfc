"""A run that goes on is one run: one folder, one record, and a list of the segments in which it was trained."""

import json
from pathlib import Path
from typing import Any

from research import metrics, run_folder
from research.files import published
from research.metrics import encode
from research.run_folder import RunFolder

STEP = "progress/step"
DROPPED = "dropped.jsonl"


def reopen(folder: RunFolder, step: int, segment: dict[str, Any]) -> int:
    """Makes the folder ready to go on after `step`: later rows leave the record, run.json says running. Returns the segment's number.

    What leaves metrics.jsonl and samples.jsonl is kept in dropped.jsonl, with the number of the segment that it was not part of.
    Each file is replaced whole: a kill in between leaves rows that the next resume drops. Rank 0 only.
    """
    run = run_folder.read_json(folder.run)
    segments = [*run.get("segments", [{"from_step": 0, "started": run.get("started")}]), {"from_step": step, **segment}]
    for path in (folder.metrics, folder.samples):
        cut(path, step, folder.path / DROPPED, len(segments))
    now = {"status": run_folder.RUNNING, "ended": None, "segments": segments}
    run.pop("reason", None)  # why the segment before this one ended
    run_folder.write_json(folder.run, {**run, **now, **run_folder.owner(), **_shown(segment)})
    return len(segments)


def _shown(segment: dict[str, Any]) -> dict[str, Any]:
    """What run.json says of the run as it is now, beside its segments."""
    return {key: segment[key] for key in ("layout", "precision", "steps", "overrides") if key in segment}


def cut(path: Path, step: int, dropped: Path, segment: int) -> None:
    """Leaves the rows up to `step` in a .jsonl file, and appends the later ones, and torn lines' remains, to `dropped`."""
    rows = list(metrics.read(path))
    later = [row for row in rows if row.get(STEP, 0) > step]
    if not later:
        return
    with dropped.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"segment": segment, "file": path.name})[:-1] + ", " + encode(row)[1:] + "\n" for row in later)
    with published(path) as temporary:
        temporary.write_text("".join(encode(row) + "\n" for row in rows if row.get(STEP, 0) <= step), encoding="utf-8")
