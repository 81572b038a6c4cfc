"""A run's segments, each from one launch to its end: prepares the folder of a resumed run, whose later rows are removed.

Everything here is done by the holder of the run's lock.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parallel.files import published, read_json, write_json
from research.tracking import metrics
from research.tracking.run_folder import RUNNING, RunFolder, owner

STEP = "progress/step"
DROPPED = "dropped.jsonl"


def reopen(folder: RunFolder, step: int, segment: dict[str, Any]) -> int:
    """Prepares the folder of a run that resumes after `step`: removes later rows, sets run.json to running. Returns the segment's number.

    Rows removed from metrics.jsonl and samples.jsonl are kept in dropped.jsonl, with the number of the segment that begins without them.
    A line that is no row, such as one cut short by a kill, is removed. Each file is replaced atomically: a kill in between leaves rows
    that the next resume drops.
    """
    run = read_json(folder.run)
    segments = [*run.get("segments", [{"from_step": 0, "started": run.get("started")}]), {"from_step": step, **segment}]
    _drop_later_rows(folder, step, len(segments))
    for key in ("reason", "code"):  # why the segment before this one ended
        run.pop(key, None)
    run |= {"status": RUNNING, "ended": None, "segments": segments, **owner()}
    run |= {key: segment[key] for key in ("layout", "precision", "steps", "overrides", "commit", "dirty") if key in segment}
    write_json(folder.run, run)
    return len(segments)


def rewind(folder: RunFolder, step: int, checkpoint: str, passed_over: Mapping[str, str]) -> None:
    """Lets the segment that `reopen` has begun start at an older checkpoint, because newer ones, `passed_over`, are damaged."""
    run = read_json(folder.run)
    segments = run["segments"]
    _drop_later_rows(folder, step, len(segments))
    known = segments[-1].get("passed_over", {})
    segments[-1] |= {"from_step": step, "checkpoint": checkpoint, "passed_over": {**known, **passed_over}}
    write_json(folder.run, run)


def _drop_later_rows(folder: RunFolder, step: int, segment: int) -> None:
    for path in (folder.metrics, folder.samples):
        _drop_rows_after(path, step, folder.path / DROPPED, segment)


def _drop_rows_after(path: Path, step: int, dropped: Path, segment: int) -> None:
    """Keeps the rows up to `step` in a .jsonl file and appends the later ones to `dropped`; removes lines that are no rows.

    The file is always a new one: a last holder that was stopped in the middle of a write, and wakes up, writes into the old one.
    """
    rows = list(metrics.read(path))
    kept = [row for row in rows if row.get(STEP, 0) <= step]
    later = [row for row in rows if row.get(STEP, 0) > step]
    if later:
        with dropped.open("a", encoding="utf-8") as file:
            for row in later:
                file.write(json.dumps({"segment": segment, "file": path.name})[:-1] + ", " + metrics.encode(row)[1:] + "\n")
    if path.is_file():
        with published(path) as temporary:
            temporary.write_text("".join(metrics.encode(row) + "\n" for row in kept), encoding="utf-8", errors="backslashreplace")
