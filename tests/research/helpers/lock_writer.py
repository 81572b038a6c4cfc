"""A tiny run: takes the lock of a run's folder, drops later rows as a resumed run does, appends rows, saves a step now and then.

What it did is written to a file of its own, which the test compares with the run's files afterwards. It imports no torch.
"""

import argparse
import errno
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from parallel.errors import Mistake
from research.tracking import acquire_lock, lock_record, metrics, run_folder, run_lock, run_status, segments
from research.tracking.run_folder import RunFolder

BEAT, LISTEN, SETTLE = 0.1, 2.0, 0.5


def main() -> None:
    """Exits with 0 at its end or after SIGTERM, 2 if it was refused, 6 if it lost the lock."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("own", type=Path)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--flock", type=int, default=1)
    arguments = parser.parse_args()
    for module in (lock_record, run_lock):
        module.BEAT_SECONDS = BEAT  # type: ignore[attr-defined]
    acquire_lock.WATCH_SECONDS, acquire_lock.SETTLE_SECONDS = LISTEN, SETTLE
    if not arguments.flock:
        lock_record.fcntl.flock = no_flock  # type: ignore[assignment]
    folder, own = RunFolder(arguments.run), metrics.JsonLines(arguments.own)
    try:
        lock = run_status.take_lock(folder)
    except Mistake as refused:
        own.write({"refused": str(refused), "at": time.monotonic()})
        raise SystemExit(2) from None
    own.write({"took": lock.number, "host": os.uname().nodename, "pid": os.getpid(), "at": time.monotonic()})

    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    saved = folder.checkpoints / "step"
    step = int(saved.read_text()) if saved.exists() else 0
    lock.check()
    segments.reopen(folder, step, {})
    rows = metrics.JsonLines(folder.metrics)
    for _ in range(arguments.rows):
        if stopped:
            break
        step += 1
        row = {"progress/step": step, "by": lock.number}
        lock.check()
        rows.write(row)
        own.write({**row, "at": time.monotonic()})
        if random.random() < 0.2:
            lock.check()
            temporary = saved.with_name(f"step.{lock.token}")
            temporary.write_text(str(step))
            lock.check()
            temporary.replace(saved)
        time.sleep(0.02)
    lock.check()
    run_folder.end(folder, run_folder.INTERRUPTED)
    own.write({"ended": lock.number, "at": time.monotonic()})
    lock.release()


def no_flock(descriptor: int, operation: int) -> None:
    """A file system without locks."""
    raise OSError(errno.ENOLCK, "No locks available")


if __name__ == "__main__":
    sys.stderr.write(json.dumps(sys.argv) + "\n")
    main()
