"""A complete W&B run from the files of the run folder, and whether W&B's own files have it all already.

metrics.jsonl and samples.jsonl have every row, so a W&B run can be written from them at any time: by `python -m research track`, and at the
end of a run whose W&B process has died. What is there already is read from W&B's files with W&B's own reader.
"""

import collections
import datetime
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.files import read_json
from research.tracking import metrics, wandb_artifacts
from research.tracking.run_folder import RunFolder
from research.tracking.wandb_artifacts import References
from research.tracking.wandb_client import (
    AXES,
    FINISH_SECONDS,
    LOWEST,
    STEP,
    Alert,
    Opened,
    RunDescription,
    call_with_timeout,
    end_process,
    finish_run,
    open_run,
    send_alert,
)

TEXTS = ("prompt", "text", "finish")
TABLE_ROWS = 1000
"""Of W&B's table of samples, which is sent whole each time: how many rows, the newest."""
TABLE, PICTURE = "samples", "loss_curve"
OFFLINE, ONLINE = "offline-run-*", "run-*"
"""W&B's names for the folder of a run; the date and time that it was opened at follow, and its id."""
SUMMARY = "offline-summary-*"
"""Our name for the folder of figures that were added to an offline run: `wandb sync` sends it, `wandb leet` does not list it."""
SECONDS, TIMESTAMP = "progress/seconds", "_timestamp"
"""Our own clock of a run, and W&B's name for the time of a row in seconds since 1970."""

Row = dict[str, Any]


def rows(folder: RunFolder, after: int = 0) -> list[Row]:
    """Every row later than step `after` that W&B was or should have been given, ordered by step; a step's samples follow its metrics."""
    samples = [sample_row(sample) for sample in metrics.read(folder.samples)]
    return sorted((row for row in [*metrics.read(folder.metrics), *samples] if row[STEP] > after), key=lambda row: row[STEP])


def sample_row(sample: Mapping[str, Any]) -> Row:
    """A row of samples.jsonl as W&B gets it: 'prompt', 'text' and 'finish' are 'sample/prompt', 'sample/text' and 'sample/finish'."""
    return {f"sample/{key}" if key in TEXTS else key: value for key, value in sample.items()}


def table(samples: Sequence[Row]) -> Row:
    """Rows of samples.jsonl, those before a resume included, as one W&B table; if there are very many, the newest."""
    import wandb

    data = [[sample.get(key) for key in (*AXES, *TEXTS)] for sample in samples[-TABLE_ROWS:]]  # an older run's have no `finish`
    return {**{axis: samples[-1][axis] for axis in AXES}, TABLE: wandb.Table(columns=["step", "tokens", *TEXTS], data=data)}


def pictures(folder: RunFolder) -> Row:
    """The loss curve as a W&B image, at the run's last step; empty if it has not been drawn."""
    last = metrics.last(folder.metrics, AXES)
    if not folder.loss_png.is_file() or len(last) < len(AXES):
        return {}
    import wandb

    return {**last, PICTURE: wandb.Image(str(folder.loss_png))}


def summary(folder: RunFolder) -> Row:
    """The run's summary as W&B makes it from metrics.jsonl: each key's last value; for validation losses the lowest, too."""
    last: Row = {}
    lowest: dict[str, float] = {}
    for row in metrics.read(folder.metrics):
        last |= row
        lowest |= {key: min(row[key], lowest.get(key, row[key])) for key in LOWEST if key in row}
    return last | {key: {"min": value, "last": last[key]} for key, value in lowest.items()}


def write(
    folder: RunFolder,
    description: RunDescription,
    mode: str,
    exit_code: int,
    *,
    after: int = 0,
    figures: Mapping[str, float] | None = None,
    finish_seconds: float = FINISH_SECONDS,
    references: Sequence[Callable[[], References]] = (),
    alerts: Sequence[Alert] = (),
) -> Opened:
    """Writes a W&B run with every row later than step `after`, the table of samples, the loss curve, and `figures` in its summary.

    `references` make artifacts; one that cannot be made is left out. Raises what W&B raises, and TimeoutError if a server did not take
    everything within `finish_seconds`.
    """
    opened = open_run(folder, description, mode, finish_seconds=finish_seconds)
    if (run := opened.run) is None:
        return opened
    late = TimeoutError(f"the server did not take everything within {finish_seconds:.0f} s")
    samples, picture = list(metrics.read(folder.samples)), pictures(folder)
    whole = [*rows(folder, after), *([table(samples)] if samples else []), *([picture] if picture else [])]

    def log(row: Row) -> bool:
        run.log(row)
        return True

    for row in with_times(whole, read_json(folder.run)):
        if TABLE not in row or opened.mode == "offline":
            log(row)
        elif not call_with_timeout(functools.partial(log, row), finish_seconds):  # W&B waits for its server here
            raise late
    for make in references:
        with suppress(OSError, ValueError, KeyError):  # a checkpoint that is gone by now
            wandb_artifacts.log(run, make())
    for alert in alerts:
        send_alert(run, alert)
    if figures:
        run.summary.update(dict(figures))
    done = finish_run(run, exit_code)
    end_process()
    if not done:
        raise late
    return opened


def with_times(rows: Sequence[Row], run_json: Mapping[str, Any]) -> Iterator[Row]:
    """The rows with the time at which they were logged, so that W&B's own time axis is the run's and not that of writing.

    That time is the run's start plus its seconds so far: exact for a run that was never stopped. Rows of samples, of their table and of
    the loss curve have no seconds: they get those of the last row before them at the same step, or else at any.
    """
    started = None
    with suppress(KeyError, TypeError, ValueError):
        started = datetime.datetime.fromisoformat(run_json["started"]).timestamp()
    at_step: dict[int, float] = {}
    last: float | None = None
    for row in rows:
        seconds = row.get(SECONDS, at_step.get(row[STEP], last))
        if started is None or seconds is None:
            yield row
            continue
        at_step[row[STEP]] = last = seconds
        yield {**row, TIMESTAMP: started + seconds}


@contextmanager
def replacing(place: Path, old: Sequence[Path]) -> Iterator[None]:
    """Moves the offline run folders `old` in `place` aside while the block writes another, and removes them after that.

    If the block raises, what it wrote is removed and they are moved back: part of the rows is better than none.
    """
    others = set(place.glob(OFFLINE)) - set(old)
    aside = {path: path.with_name(f".{path.name}") for path in old}  # a name is the second it was made in: the new one may be the same
    for path, hidden in aside.items():
        path.rename(hidden)
    try:
        yield
    except BaseException:
        for incomplete in set(place.glob(OFFLINE)) - others:
            shutil.rmtree(incomplete, ignore_errors=True)
        for path, hidden in aside.items():
            hidden.rename(path)
        raise
    for hidden in aside.values():
        shutil.rmtree(hidden, ignore_errors=True)


@dataclass(frozen=True)
class Known:
    """What W&B's files of a run hold."""

    files: tuple[Path, ...]
    """The run-*.wandb files, oldest first: one for each time that W&B was started for this run."""
    missing_rows: int
    missing_figures: int
    missing_checkpoints: int = 0
    """Complete checkpoints that no artifact refers to."""

    @property
    def complete(self) -> bool:
        """Whether nothing would be added by writing the run again."""
        return bool(self.files) and not self.missing_rows and not self.missing_figures

    @property
    def online(self) -> bool:
        """Whether W&B has sent at least a part of the run to a server while it was trained."""
        return any(not path.parent.name.startswith("offline-") for path in self.files)


def known(folder: RunFolder, figures: Mapping[str, float]) -> Known:
    """Compares W&B's files with metrics.jsonl, samples.jsonl and `figures`, the results of evaluations."""
    files = tuple(files_of(folder))
    logged: collections.Counter[tuple[Any, ...]] = collections.Counter()
    told: Row = {}
    referred: set[str] = set()
    for path in files:
        for record in inspect(path):
            if record["type"] == "history":
                logged[_identity(record["history"]["item"])] += 1
            elif record["type"] == "summary":
                told |= record["summary"].get("update", {})
            elif record["type"] == "artifact":
                referred |= set(record["artifact"].get("aliases", []))
    wanted = collections.Counter(map(_identity, rows(folder)))
    missing_figures = sum(told.get(name) != value for name, value in metrics.finite(dict(figures)).items())
    missing_checkpoints = sum(path.name not in referred for path in wandb_artifacts.checkpoints(folder))
    return Known(files, (wanted - logged).total(), missing_figures, missing_checkpoints)


def files_of(folder: RunFolder) -> list[Path]:
    """The run-*.wandb files in W&B's folder, oldest first."""
    found = [file for kind in (OFFLINE, SUMMARY, ONLINE) for file in folder.wandb.glob(f"{kind}/run-*.wandb")]
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-").partition("-")[2])


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The step and the keys of a row, without W&B's own ones: two rows of one run differ in these."""
    return (row.get(STEP), *sorted(key for key in row if not key.startswith("_")))


def inspect(path: Path) -> Iterator[Row]:
    """The records of a run-*.wandb file, as W&B's own reader prints them; those before the damage if the file is cut short."""
    reader = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    found = subprocess.run(reader, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    for line in found.stdout.splitlines():
        with suppress(ValueError):
            yield json.loads(line)
