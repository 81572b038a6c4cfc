"""What a launch has left on disk, seen from outside: which run it made or went on with, how that ended, how far it is saved."""

import contextlib
import json
from pathlib import Path
from typing import Any

from research import run_folder
from research.run_folder import RunFolder

RESUME = "--resume"


class Record:
    """The runs of one experiment, before and after a launch."""

    def __init__(self, runs: Path) -> None:
        """`runs` is the folder NAME/ that holds ID/ of each run."""
        self._runs = runs
        self._before: dict[Path, tuple[bytes, int]] = {}
        self.run: RunFolder | None = None
        """The one that the last launch has made or gone on with; None where it has not come so far."""
        self.last = -1
        """The step up to which it was saved when it was looked at; −1: no checkpoint."""

    def begin(self) -> None:
        """A launch begins: all run.json that change from now on are its own."""
        self._before = {path: (path.read_bytes(), saved_step(RunFolder(path.parent))) for path in self._files()}
        self.run = None

    def end(self) -> bool:
        """The launch is over; whether there is a newer checkpoint than before it, and than when one was looked at last."""
        changed = [path for path in self._files() if path.read_bytes() != self._before.get(path, (b"", -1))[0]]
        if not changed:
            return False
        newest = max(changed, key=lambda path: path.stat().st_mtime)
        self.run = RunFolder(newest.parent)
        known = max(self._before.get(newest, (b"", -1))[1], self.last)
        self.last = saved_step(self.run)
        return self.last > known

    def _files(self) -> list[Path]:
        return [path for path in self._runs.glob("*/run.json") if not path.parent.is_symlink()]

    def state(self) -> tuple[str, str]:
        """The run's status and its reason; '' each where there is no run."""
        run: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            run = run_folder.read_json(self.run.run) if self.run else {}
        return (run_folder.status(run) if run else "", str(run.get("reason", "")))

    def settings(self, given: list[str]) -> list[str]:
        """What the next launch is given: the same, and to go on from the last checkpoint where there is one.

        `auto` names the newest run; where another has been started meanwhile, this one is named by its folder.
        """
        if self.run is None or self.last < 0:
            return given
        newest = (self._runs / "latest").resolve() == self.run.path.resolve()
        return [*_without_resume(given), RESUME, "auto" if newest else str(self.run.path)]


def saved_step(run: RunFolder) -> int:
    """The step of the checkpoint that `latest` names, −1 where there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        name = (run.checkpoints / "latest").read_text().strip()
        return int(json.loads((run.checkpoints / name / "manifest.json").read_bytes())["step"])
    return -1


def _without_resume(given: list[str]) -> list[str]:
    """The settings less `--resume X` and `--resume=X`."""
    kept = []
    skip = False
    for word in given:
        if not skip and word.partition("=")[0] != RESUME:
            kept.append(word)
        skip = word == RESUME
    return kept
