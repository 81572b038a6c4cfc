"""Runs one launch in a mount namespace of its own, on a small disk that fills up while it trains, or whose folder is deleted.

The disk is a tmpfs that only this process and its launch see. What was left is printed as JSON on the last line.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from research.tracking import lock_record, metrics, run_folder, run_status
from research.tracking.run_folder import RunFolder

LIMIT = 240.0


def main(plan: dict[str, Any]) -> dict[str, Any]:
    """`plan`: runs (the mount point), megabytes, command, again (the command of the resumed launch), what, after_rows."""
    runs = Path(plan["runs"])
    runs.mkdir(exist_ok=True)
    mount(runs, plan["megabytes"])
    began = launch(plan["command"])
    folder = wait_for_rows(runs, plan["after_rows"], began)
    if plan.get("other_disk_for_checkpoints"):
        mount(folder.checkpoints, 8)
    hit = time.monotonic()
    filler = runs / "filler"
    if plan["what"] == "delete":
        shutil.rmtree(folder.path)
    else:
        fill(filler)
    out, err = began.communicate(timeout=LIMIT)
    left = {"code": began.returncode, "out": out, "err": err, "seconds": time.monotonic() - hit, **what_is_left(folder)}
    if plan.get("again"):
        filler.unlink(missing_ok=True)
        again = launch(plan["again"])
        out, err = again.communicate(timeout=LIMIT)
        left["again"] = {"code": again.returncode, "out": out, "err": err, **what_is_left(folder)}
    return left


def mount(path: Path, megabytes: int) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(path)], check=True)


def launch(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_rows(runs: Path, rows: int, process: subprocess.Popen[str]) -> RunFolder:
    """The run's folder, once it has so many rows."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        for folder in run_folder.every(runs):
            if len(list(metrics.read(folder.metrics))) >= rows:
                return folder
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate())


def fill(path: Path) -> None:
    """Takes every byte that the disk has left."""
    with path.open("wb", buffering=0) as file:
        for size in (2**16, 2**12, 2**8, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass


def what_is_left(folder: RunFolder) -> dict[str, Any]:
    """The run's record as files, and as the verbs read it."""
    if not folder.run.is_file():
        return {"run": None}
    owner = lock_record.newest(folder.lock)
    written = [path for path in (folder.metrics, folder.samples) if path.is_file() and path.stat().st_size]
    torn = [path.name for path in written if path.read_bytes()[-1:] != b"\n"]
    return {
        "written": json.loads(folder.run.read_text()),
        "run": run_folder.read_run(folder),
        "status": run_status.status(run_folder.read_run(folder), folder),
        "end": dict(owner.end) if owner else {},
        "steps": [row["progress/step"] for row in metrics.read(folder.metrics) if "train/loss" in row],
        "losses": [float(row["train/loss"]).hex() for row in metrics.read(folder.metrics) if "train/loss" in row],
        "torn": torn,
        "checkpoints": sorted(path.name for path in folder.checkpoints.glob("*")),
        "temporary": sorted(str(path.relative_to(folder.path)) for path in folder.path.rglob("*.tmp")),
        "config": folder.config.is_file(),
        "log": folder.rank_log(0).read_text(errors="replace") if folder.rank_log(0).is_file() else "",
    }


if __name__ == "__main__":
    os.environ["PYTHONUNBUFFERED"] = "1"
    print(json.dumps(main(json.loads(sys.argv[1]))))
