"""Where a run keeps everything it writes: runs/NAME/ID/, and `runs/NAME/latest`, a link to the newest.

```
runs/NAME/ID/  run.json        what `python -m research runs` lists: name, id, started, ended, status, layout, precision, steps, host, pid
               config.json     the experiment, resolved          deepspeed.json  what DeepSpeed was given
               metrics.jsonl   one row a line (research/tracking/metrics.py)     samples.jsonl   what the model wrote
               loss.png        the loss curve                    source/         config.py, variant.py and SHA256SUMS
               evaluations/    step_000300.json, what `evaluate` found
               checkpoints/    step_000300/ …                    logs/           rank_0.txt …        wandb/   W&B's own files
```
JSON files are replaced whole or not at all: a reader never sees half of one, whenever the writer was killed.
"""
# MERGED-DOC """A run that goes on is one run: one folder, one record, and a list of the segments in which it was trained."""

import datetime
import hashlib
import json
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from parallel.files import published, read_json, write_json
from research.tracking import metrics
from research.tracking.metrics import encode

RUNNING, FINISHED, INTERRUPTED, FAILED, DIED = "running", "finished", "interrupted", "failed", "died"
"""run.json says one of the first four; `died` is what `status` makes of a `running` whose process is gone."""
IMPORTED = "imported"
"""What run.json says of weights that another program has trained."""
SOURCES = ("config.py", "variant.py")


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run. Making the object touches no disk, so every rank may make it from the id that rank 0 drew."""

    path: Path

    @property
    def name(self) -> str:
        """The experiment's name: the folder above."""
        return self.path.parent.name

    @property
    def id(self) -> str:
        """Six hexadecimal digits, drawn by `create`."""
        return self.path.name

    @property
    def title(self) -> str:
        """name-id, what the terminal and W&B call the run."""
        return f"{self.name}-{self.id}"

    @property
    def shown(self) -> str:
        """The folder as one would type it here: relative to the working directory where it lies in it."""
        path = os.path.relpath(self.path)
        return str(self.path) if path.startswith("..") else path

    run = property(lambda self: self.path / "run.json")
    config = property(lambda self: self.path / "config.json")
    deepspeed = property(lambda self: self.path / "deepspeed.json")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    samples = property(lambda self: self.path / "samples.jsonl")
    loss_png = property(lambda self: self.path / "loss.png")
    source = property(lambda self: self.path / "source")
    checkpoints = property(lambda self: self.path / "checkpoints")
    incidents = property(lambda self: self.path / "incidents")
    logs = property(lambda self: self.path / "logs")
    wandb = property(lambda self: self.path / "wandb")

    def rank_log(self, rank: int) -> Path:
        """The log of one rank."""
        return self.logs / f"rank_{rank}.txt"

    def sign(self, rank: int) -> Path:
        """The sign of life of one rank, while it runs."""
        return self.logs / f"rank_{rank}.alive.json"


def create(runs: Path, name: str) -> RunFolder:
    """A new, empty run folder with an id nobody else has, and `runs/NAME/latest` pointing at it. Rank 0 only."""
    folder = RunFolder(Path(runs) / name / secrets.token_hex(3))
    try:
        folder.path.mkdir(parents=True)
    except OSError as error:
        if folder.path.is_dir():  # one chance in 16 million: the id is taken, draw again
            return create(runs, name)
        raise Mistake(f"track.runs: cannot make {folder.path} ({error.strerror}) → set track.runs to a folder you may write") from None
    for sub in (folder.checkpoints, folder.logs):
        sub.mkdir()
    point_latest(folder)
    return folder


def point_latest(folder: RunFolder) -> None:
    """`latest` → ID by one rename: it always exists and always points at a whole run folder."""
    temporary = folder.path.parent / f".latest-{folder.id}"
    temporary.symlink_to(folder.id, target_is_directory=True)
    temporary.replace(folder.path.parent / "latest")


def start(folder: RunFolder, *, layout: str, precision: str, steps: int, **more: Any) -> None:
    """Write run.json with status `running`; `layout` and `precision` as a person reads them, `steps` as planned."""
    known = {"schema": 1, "name": folder.name, "id": folder.id, "status": RUNNING, "started": now(), "ended": None}
    write_json(folder.run, {**known, "layout": layout, "precision": precision, "steps": steps, **owner(), **more})


def owner() -> dict[str, Any]:
    """Who writes this run: host and process of rank 0."""
    return {"host": hostname(), "pid": os.getpid()}


def hostname() -> str:
    """This machine's, as run.json has it."""
    return socket.gethostname()


def end(folder: RunFolder, status: str, reason: str = "") -> None:
    """Set run.json's status to finished, interrupted or failed, `ended` to now, `reason` to why it is not finished."""
    run = {**read_json(folder.run), "status": status, "ended": now()}
    if status == FINISHED:
        run.pop("reason", None)  # of an earlier end
    elif reason:
        run["reason"] = reason
    write_json(folder.run, run)


def end_unless_ended(folder: RunFolder, status: str, reason: str) -> None:
    """`end`, but what another rank has written of the end stays. Any rank."""
    if read_json(folder.run).get("status") == RUNNING:
        end(folder, status, reason)


def status(run: dict[str, Any]) -> str:
    """run.json's status; `died` for a `running` one of this machine whose process no longer exists."""
    if run.get("status") != RUNNING or run.get("host") != hostname() or not isinstance(run.get("pid"), int):
        return str(run.get("status", "unknown"))
    return RUNNING if _alive(run["pid"]) else DIED


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def now() -> str:
    """The time in UTC, to the second: 2026-01-31T12:00:00+00:00."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def keep_source(folder: RunFolder, experiment: Path) -> dict[str, str]:
    """Copy the experiment's config.py and variant.py (where there is one) to source/; returns {file name: SHA-256}.

    source/SHA256SUMS holds the same digests: `cd source && sha256sum -c SHA256SUMS` proves that nobody edited the copies.
    """
    folder.source.mkdir(exist_ok=True)
    sums = {name: _copy_hashed(experiment / name, folder.source / name) for name in SOURCES if (experiment / name).is_file()}
    (folder.source / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    return sums


def _copy_hashed(source: Path, target: Path) -> str:
    """Copy and hash the same bytes: the digest is the copy's even if the source is edited meanwhile."""
    content = source.read_bytes()
    target.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def every(runs: Path) -> list[RunFolder]:
    """The run folders under `runs`, in order of name and id (`latest` is a link and not counted twice)."""
    return [RunFolder(path.parent) for path in sorted(Path(runs).glob("*/*/run.json")) if not path.parent.is_symlink()]


def find(handle: str, runs: Path = Path("runs")) -> RunFolder:
    """The run folder a person means by a path (runs/gpt_sotu/latest), an experiment's name (its latest) or a title (gpt_sotu-7f3a2c)."""
    name, _, ident = handle.rpartition("-")
    guesses = [Path(handle), Path(runs) / handle, *([Path(runs) / name / ident] if name else [])]
    for path in [place for guess in guesses for place in (guess, guess / "latest")]:
        if (path / "run.json").is_file():
            return RunFolder(path.resolve())
    raise Mistake(f"there is no run folder {handle} → {_choices(Path(runs))}")


def _choices(runs: Path) -> str:
    """The newest runs, as the end of a sentence."""
    found = sorted(every(runs), key=lambda folder: folder.run.stat().st_mtime, reverse=True)
    if not found:
        return f"{runs} holds no run yet: make one with `deepspeed experiments/gpt_sotu/launch.py`"
    more = f" or {len(found) - 5} more (`python -m research runs`)" if len(found) > 5 else ""
    return "there are " + ", ".join(str(folder.path) for folder in found[:5]) + more


STEP = "progress/step"
DROPPED = "dropped.jsonl"


def reopen(folder: RunFolder, step: int, segment: dict[str, Any]) -> int:
    """Makes the folder ready to go on after `step`: later rows leave the record, run.json says running. Returns the segment's number.

    What leaves metrics.jsonl and samples.jsonl is kept in dropped.jsonl, with the number of the segment that it was not part of.
    Each file is replaced whole: a kill in between leaves rows that the next resume drops. Rank 0 only.
    """
    run = read_json(folder.run)
    segments = [*run.get("segments", [{"from_step": 0, "started": run.get("started")}]), {"from_step": step, **segment}]
    for path in (folder.metrics, folder.samples):
        cut(path, step, folder.path / DROPPED, len(segments))
    now = {"status": RUNNING, "ended": None, "segments": segments}
    run.pop("reason", None)  # why the segment before this one ended
    write_json(folder.run, {**run, **now, **owner(), **_shown(segment)})
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
