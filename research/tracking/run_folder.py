"""The run folder: where a run keeps everything it writes, runs/NAME/ID/, and `runs/NAME/latest`, a link to the newest.

```
runs/NAME/ID/  run.json        what `python -m research runs` lists: name, id, started, ended, status, layout, precision, steps, host, pid
               config.json     the experiment, resolved          deepspeed.json  what DeepSpeed was given
               metrics.jsonl   one row per line (research/tracking/metrics.py)   samples.jsonl   what the model wrote
               loss.png        the loss curve                    source/         config.py, variant.py and SHA256SUMS
               evaluations/    step_000300.json, the results of `evaluate`
               checkpoints/    step_000300/ …                    logs/           rank_0.txt …        wandb/   W&B's own files
```
A resumed run goes on in its folder: run.json lists its segments, each from one launch to its end (`reopen`).
JSON files are replaced atomically: a reader never sees half of one, whenever the writer was killed.
"""

import datetime
import hashlib
import json
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.checkpoint.folder import MANIFEST, latest
from parallel.errors import Mistake
from parallel.files import published, read_json, write_json
from research.tracking import metrics
from research.tracking.format import short_path

RUNNING, FINISHED, INTERRUPTED, FAILED, DIED = "running", "finished", "interrupted", "failed", "died"
"""The status in run.json is one of the first four; `status` returns `died` for a `running` run whose process is gone."""
IMPORTED = "imported"
"""The status in run.json of weights that another program has trained."""
SOURCES = ("config.py", "variant.py")
STEP = "progress/step"
DROPPED = "dropped.jsonl"


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run. Making the object accesses no disk, so every rank may make it from the id that rank 0 drew."""

    path: Path

    @property
    def name(self) -> str:
        """The experiment's name: that of the folder above."""
        return self.path.parent.name

    @property
    def id(self) -> str:
        """Six hexadecimal digits, drawn by `create`."""
        return self.path.name

    @property
    def title(self) -> str:
        """NAME-ID, what the terminal and W&B call the run."""
        return f"{self.name}-{self.id}"

    @property
    def shown(self) -> str:
        """The folder as one would type it here."""
        return short_path(self.path)

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
    wandb_json = property(lambda self: self.path / "wandb.json")

    def rank_log(self, rank: int) -> Path:
        """The log of one rank."""
        return self.logs / f"rank_{rank}.txt"

    def heartbeat(self, rank: int) -> Path:
        """The heartbeat file of one rank, while it runs (research/reliability/heartbeat.py)."""
        return self.logs / f"rank_{rank}.alive.json"


def create(runs: Path, name: str) -> RunFolder:
    """A new, empty run folder with an unused id, and `runs/NAME/latest` pointing at it. Rank 0 only."""
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
    """`latest` → ID by one rename: the link always exists and always points at a whole run folder."""
    temporary = folder.path.parent / f".latest-{folder.id}"
    temporary.symlink_to(folder.id, target_is_directory=True)
    temporary.replace(folder.path.parent / "latest")


def start(folder: RunFolder, *, layout: str, precision: str, steps: int, **more: Any) -> None:
    """Writes run.json with status `running`; `layout` and `precision` as a person reads them, `steps` as planned."""
    known = {"schema": 1, "name": folder.name, "id": folder.id, "status": RUNNING, "started": now(), "ended": None}
    write_json(folder.run, {**known, "layout": layout, "precision": precision, "steps": steps, **owner(), **more})


def owner() -> dict[str, Any]:
    """The host and process that write the run: rank 0's."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def end(folder: RunFolder, status: str, reason: str = "") -> None:
    """Sets run.json's status to finished, interrupted or failed, `ended` to now, `reason` to why it is not finished."""
    run = {**read_json(folder.run), "status": status, "ended": now()}
    if status == FINISHED:
        run.pop("reason", None)  # of an earlier end
    elif reason:
        run["reason"] = reason
    write_json(folder.run, run)


def end_unless_ended(folder: RunFolder, status: str, reason: str) -> None:
    """`end`, unless another rank has already written how the run ended. Any rank may call it."""
    if read_json(folder.run).get("status") == RUNNING:
        end(folder, status, reason)


def status(run: dict[str, Any]) -> str:
    """run.json's status; `died` for a `running` one of this machine whose process no longer exists."""
    pid = run.get("pid")
    if run.get("status") != RUNNING or run.get("host") != socket.gethostname() or not isinstance(pid, int):
        return str(run.get("status", "unknown"))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return DIED
    except PermissionError:  # the process exists, and is another user's
        pass
    return RUNNING


def now() -> str:
    """The time in UTC, to the second: 2026-01-31T12:00:00+00:00."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def keep_source(folder: RunFolder, experiment: Path) -> dict[str, str]:
    """Copies the experiment's config.py and, if it has one, variant.py to source/; returns {file name: SHA-256}.

    source/SHA256SUMS holds the same digests: `cd source && sha256sum -c SHA256SUMS` proves that nobody edited the copies.
    """
    folder.source.mkdir(exist_ok=True)
    sums = {}
    for name in SOURCES:
        if (experiment / name).is_file():
            content = (experiment / name).read_bytes()  # read once: the digest is the copy's even if the source is edited meanwhile
            (folder.source / name).write_bytes(content)
            sums[name] = hashlib.sha256(content).hexdigest()
    (folder.source / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    return sums


def every(runs: Path) -> list[RunFolder]:
    """The run folders under `runs`, ordered by name and id (the link `latest` is not counted)."""
    return [RunFolder(path.parent) for path in sorted(Path(runs).glob("*/*/run.json")) if not path.parent.is_symlink()]


def find(handle: str, runs: Path = Path("runs")) -> RunFolder:
    """The run that a person names by a path (runs/gpt_sotu/latest), an experiment's name (its latest) or a title (gpt_sotu-7f3a2c)."""
    name, _, ident = handle.rpartition("-")
    guesses = [Path(handle), Path(runs) / handle, *([Path(runs) / name / ident] if name else [])]
    for path in [place for guess in guesses for place in (guess, guess / "latest")]:
        if (path / "run.json").is_file():
            return RunFolder(path.resolve())

    # none: the error lists the newest runs
    runs = Path(runs)
    newest = sorted(every(runs), key=lambda folder: folder.run.stat().st_mtime, reverse=True)
    choices = f"{runs} holds no run yet: make one with `deepspeed experiments/gpt_sotu/launch.py`"
    if newest:
        choices = "there are " + ", ".join(str(folder.path) for folder in newest[:5])
    if len(newest) > 5:
        choices += f" or {len(newest) - 5} more (`python -m research runs`)"
    raise Mistake(f"there is no run folder {handle} → {choices}")


def find_checkpoint(handle: str, runs: Path = Path("runs"), needs: str = "run.json") -> tuple[RunFolder, Path]:
    """(run, checkpoint) for a handle that names a checkpoint's folder or, as in `find`, a run: then its newest checkpoint.

    A checkpoint's run is the folder that it lies in; a Mistake if that has no file `needs`.
    """
    path = Path(handle)
    if not (path / MANIFEST).is_file():
        folder = find(handle, runs)
        return folder, latest(folder.checkpoints)
    path = path.resolve()
    folder = RunFolder(path.parent.parent)
    if not (folder.path / needs).is_file():
        raise Mistake(f"{handle} is a checkpoint outside of a run's folder → name one in runs/NAME/ID/checkpoints")
    return folder, path


def reopen(folder: RunFolder, step: int, segment: dict[str, Any]) -> int:
    """Prepares the folder of a run that resumes after `step`: removes later rows, sets run.json to running. Returns the segment's number.

    Rows removed from metrics.jsonl and samples.jsonl are kept in dropped.jsonl, with the number of the segment that begins without them.
    Each file is replaced atomically: a kill in between leaves rows that the next resume drops. Rank 0 only.
    """
    run = read_json(folder.run)
    segments = [*run.get("segments", [{"from_step": 0, "started": run.get("started")}]), {"from_step": step, **segment}]
    for path in (folder.metrics, folder.samples):
        _drop_rows_after(path, step, folder.path / DROPPED, len(segments))
    run.pop("reason", None)  # why the segment before this one ended
    run |= {"status": RUNNING, "ended": None, "segments": segments, **owner()}
    run |= {key: segment[key] for key in ("layout", "precision", "steps", "overrides") if key in segment}
    write_json(folder.run, run)
    return len(segments)


def _drop_rows_after(path: Path, step: int, dropped: Path, segment: int) -> None:
    """Keeps the rows up to `step` in a .jsonl file and appends the later ones to `dropped`."""
    rows = list(metrics.read(path))
    later = [row for row in rows if row.get(STEP, 0) > step]
    if not later:
        return
    with dropped.open("a", encoding="utf-8") as file:
        for row in later:
            file.write(json.dumps({"segment": segment, "file": path.name})[:-1] + ", " + metrics.encode(row)[1:] + "\n")
    with published(path) as temporary:
        temporary.write_text("".join(metrics.encode(row) + "\n" for row in rows if row.get(STEP, 0) <= step), encoding="utf-8")
