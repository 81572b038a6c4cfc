"""The run folder: where a run keeps everything it writes, runs/NAME/ID/, and `runs/NAME/latest`, a link to one of them.

`latest`, like a bare NAME, means the newest run that has a complete checkpoint; while none has one, the newest run.

```
runs/NAME/ID/  run.json        what `python -m research runs` lists: name, id, started, ended, status, layout, precision, steps, process
               config.json     the experiment, resolved          deepspeed.json  what DeepSpeed was given
               metrics.jsonl   one row per line (research/tracking/metrics.py)   samples.jsonl   what the model wrote
               loss.png        the loss curve                    source/         config.py, variant.py and SHA256SUMS
               evaluations/    step_000300.json, the results of `evaluate`
               profile/        traces and summary of the steps that `profile.steps` names
               checkpoints/    step_000300/ …                    logs/           rank_0.txt …        wandb/   W&B's own files
               lock/           which process may change the run (research/tracking/run_lock.py)
```
Whoever changes a run's files holds its lock, but for `evaluate`, whose results are files of their own, and the logs of each rank.
A resumed run goes on in its folder: run.json lists its segments, each from one launch to its end (research/tracking/segments.py).
JSON files are replaced atomically: a reader never sees half of one, whenever the writer was killed.
"""

import contextlib
import hashlib
import secrets
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parallel.checkpoint.folder import MANIFEST, latest, newest_complete
from parallel.errors import Mistake
from parallel.files import read_json, write_json
from parallel.process_identity import ProcessIdentity
from research.tracking import acquire_lock
from research.tracking.format import short_path
from research.tracking.lock_record import HEARTBEATS, now
from research.tracking.lock_record import newest as newest_record
from research.tracking.run_lock import RunLock

RUNNING, FINISHED, INTERRUPTED, FAILED = "running", "finished", "interrupted", "failed"
"""The status in run.json; of a process that was killed, too, it says `running` (research/tracking/run_status.py)."""
IMPORTED = "imported"
"""The status in run.json of weights that another program has trained."""
LATEST = "latest"
STARTING = "--resume auto"
"""The purpose of a process that is about to begin a new run, because it has found none to resume."""
SOURCES = ("config.py", "variant.py")


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
    profile = property(lambda self: self.path / "profile")
    wandb = property(lambda self: self.path / "wandb")
    wandb_json = property(lambda self: self.path / "wandb.json")
    lock = property(lambda self: self.path / "lock")

    def rank_log(self, rank: int) -> Path:
        """The log of one rank."""
        return self.logs / f"rank_{rank}.txt"

    def heartbeat(self, rank: int) -> Path:
        """The heartbeat file of one rank, while it runs (research/reliability/heartbeat.py)."""
        return self.logs / HEARTBEATS.replace("*", str(rank))


def create(runs: Path, name: str) -> RunFolder:
    """A new, empty run folder with an unused id. Rank 0 only."""
    folder = RunFolder(Path(runs) / name / secrets.token_hex(3))
    try:
        folder.path.mkdir(parents=True)
    except OSError as error:
        if folder.path.is_dir():  # one chance in 16 million: the id is taken, draw again
            return create(runs, name)
        raise Mistake(f"track.runs: cannot make {folder.path} ({error.strerror}) → set track.runs to a folder you may write") from None
    for sub in (folder.checkpoints, folder.logs):
        sub.mkdir()
    return folder


def newest(runs: Path) -> RunFolder | None:
    """Of the runs in `runs` (runs/NAME), the one that started last among those with a complete checkpoint, else among all."""
    in_order = by_start(of_experiment(runs))
    return next((run for run in reversed(in_order) if newest_complete(run.checkpoints)), in_order[-1] if in_order else None)


def by_start(folders: Iterable[RunFolder]) -> list[RunFolder]:
    """The runs, the one that started last at the end. Those of one second are ordered by their last change of run.json."""

    def started(folder: RunFolder) -> tuple[str, int]:
        try:
            return str(read_json(folder.run).get("started", "")), folder.run.stat().st_mtime_ns
        except (OSError, ValueError, AttributeError):
            return "", 0

    return sorted(folders, key=started)


def point_latest(runs: Path) -> None:
    """Makes `latest` in `runs` (runs/NAME) a link to the `newest` run, by one rename; there is no link if there is no run."""
    link, run = runs / LATEST, newest(runs)
    if link.is_dir() and not is_latest(link):  # `cp -rL` or `scp -r` has made a folder of it
        return
    if run is None:
        link.unlink(missing_ok=True)
        return
    temporary = runs / f".{LATEST}-{uuid.uuid4().hex}"
    temporary.symlink_to(run.id, target_is_directory=True)
    temporary.replace(link)


def discard(folder: RunFolder) -> None:
    """Removes the folder of a run that was refused before its first step, and runs/NAME if nothing else is in it. Rank 0 only.

    It is renamed first: until they leave, the run's threads go on writing heartbeats to its old path. A disk that refuses keeps it.
    """
    hidden = folder.path.with_name(f".{folder.id}.refused")
    with contextlib.suppress(OSError):
        folder.path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
        point_latest(folder.path.parent)
        folder.path.parent.rmdir()


def start(folder: RunFolder, *, layout: str, precision: str, steps: int, **more: Any) -> None:
    """Writes run.json with status `running`, then `latest`; `layout` and `precision` as a person reads them, `steps` as planned."""
    known = {"schema": 1, "name": folder.name, "id": folder.id, "status": RUNNING, "started": now(), "ended": None}
    write_json(folder.run, {**known, "layout": layout, "precision": precision, "steps": steps, **owner(), **more})
    point_latest(folder.path.parent)


def owner() -> dict[str, Any]:
    """The process that writes the run, rank 0's, as run.json names it: host, pid, and what tells it from others with the same pid."""
    return asdict(ProcessIdentity.current())


def end(folder: RunFolder, status: str, reason: str = "", code: int = 0) -> None:
    """Sets run.json's status to finished, interrupted or failed, `ended` to now, `reason` and exit `code` to why it is not finished."""
    run = {**read_json(folder.run), "status": status, "ended": now()}
    run.pop("code", None)  # of an earlier end
    if status == FINISHED:
        run.pop("reason", None)
    elif reason:
        run["reason"] = reason
    write_json(folder.run, run | ({"code": code} if code else {}))


def end_or_keep(folder: RunFolder, lock: RunLock, status: str, reason: str, code: int = 0) -> None:
    """`end`, by the holder of the lock. If run.json cannot be written, the lock's record says how the run ended; `read_run` finds it."""
    lock.check()
    try:
        end(folder, status, reason, code)
    except (OSError, Mistake):
        lock.keep_end({"status": status, "ended": now(), "reason": reason, **({"code": code} if code else {})})


def end_unless_ended(folder: RunFolder, status: str, reason: str, rank_0: ProcessIdentity) -> None:
    """`end`, unless rank 0 or another rank has written how the run ended, or another launch goes on with it. Any rank may call it.

    `rank_0` is the process that run.json must name. While run.json is written here, nobody can take the lock over that rank 0 has left.
    """
    with contextlib.suppress(OSError), acquire_lock.kept_from_others(folder.lock, rank_0) as free:
        run = read_json(folder.run)
        process = ProcessIdentity.from_json(run)
        if free and run.get("status") == RUNNING and (process is None or process.is_same(rank_0)):
            end(folder, status, reason)


def read_run(folder: RunFolder) -> dict[str, Any]:
    """run.json; where it says that the run is running, with the end that its last process could write into the lock's record only."""
    run = read_json(folder.run)
    if (
        run.get("status") == RUNNING
        and (owner := newest_record(folder.lock))
        and owner.end.get("status") in (FINISHED, INTERRUPTED, FAILED)
    ):
        return run | dict(owner.end)
    return run


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
    return _folders(runs, "*/*/run.json")


def of_experiment(runs: Path) -> list[RunFolder]:
    """The run folders in `runs` (runs/NAME), ordered by id."""
    return _folders(runs, "*/run.json")


def _folders(root: Path, pattern: str) -> list[RunFolder]:
    """The run folders whose run.json matches, in order; neither `latest`, be it a link or a copy of one, nor hidden ones."""
    folders = [RunFolder(path.parent) for path in sorted(Path(root).glob(pattern))]
    return [folder for folder in folders if folder.id != LATEST and not folder.id.startswith(".") and not folder.path.is_symlink()]


def find(handle: str, runs: Path = Path("runs")) -> RunFolder:
    """The run that a person names by a path (runs/gpt_sotu/7f3a2c) or a title (gpt_sotu-7f3a2c).

    An experiment's name, with or without `latest`, names the `newest` of its runs.
    """
    name, _, ident = handle.rpartition("-")
    for path in [Path(handle), Path(runs) / handle, *([Path(runs) / name / ident] if name else [])]:
        if folder := _run_at(path):
            return RunFolder(folder.path.resolve())

    # none: the error lists the newest runs
    known = by_start(every(runs))[::-1]
    choices = f"{runs} holds no run yet: make one with `deepspeed experiments/gpt_sotu/launch.py`"
    if known:
        choices = "there are " + ", ".join(str(folder.path) for folder in known[:5])
    if len(known) > 5:
        choices += f" or {len(known) - 5} more (`python -m research runs`)"
    raise Mistake(f"there is no run folder {handle:.100} → {choices}")


def _run_at(path: Path) -> RunFolder | None:
    """The run that the path of a run, of an experiment's runs or of `latest` names."""
    with contextlib.suppress(OSError):  # no folder can have such a name
        if has_file(path, "run.json") and not is_latest(path):
            return RunFolder(path)
        return newest(path.parent if path.name == LATEST else path)
    return None


def refuse_link(folder: Path) -> None:
    """Raises a Mistake if a folder of a run, into which files are written, is a link: a stranger's would lead to a folder of its reader."""
    if folder.is_symlink():
        raise Mistake(f"{folder} is a link, and nothing is written through it → put a folder in its place")


def has_file(folder: Path, name: str) -> bool:
    """Whether the folder that a person names has this file; False also for a name that no folder can have, such as a whole prompt."""
    with contextlib.suppress(OSError):
        return (folder / name).is_file()
    return False


def is_latest(path: Path) -> bool:
    """Whether it is the link; a copy of a run may have its name."""
    return path.name == LATEST and path.is_symlink()


def find_checkpoint(handle: str, runs: Path = Path("runs"), needs: str = "run.json") -> tuple[RunFolder, Path]:
    """(run, checkpoint) for a handle that names a checkpoint's folder or, as in `find`, a run: then its newest checkpoint.

    A checkpoint's run is the folder that it lies in; a Mistake if that has no file `needs`.
    """
    path = Path(handle)
    if not has_file(path, MANIFEST):
        folder = find(handle, runs)
        return folder, latest(folder.checkpoints)
    path = path.resolve()
    folder = RunFolder(path.parent.parent)
    if not (folder.path / needs).is_file():
        raise Mistake(f"{handle} is a checkpoint outside of a run's folder → name one in runs/NAME/ID/checkpoints")
    return folder, path
