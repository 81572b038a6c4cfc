"""What was found by reading large files, remembered in data.cache until one of them changes: nothing is read again at the next start.

A record is a small JSON file: path, size and modification time of the files that were read, when the reading began, and what was found.
It is believed while sizes and modification times are the same, and if the files had not changed in the seconds before the reading: a file
can change twice within one tick of its file system's clock. Small files that have just changed are read again; long ones are given time.
"""

import contextlib
import functools
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.files import locked, read_json, write_json

SETTLED_NS = 2 * 10**9
"""How long before the reading a file must have been changed last. No common file system has a coarser clock."""
LONG = 64 * 2**20
"""Bytes from which on reading is shown, and is worth a wait of SETTLED_NS. Fewer take a moment."""

Advance = Callable[[int], object]
Progress = Callable[[str], AbstractContextManager[Advance]]
"""Called with what begins; the context lasts as long as it does, and is told how many more characters are done."""


def silent(what: str) -> AbstractContextManager[Advance]:
    """The Progress that shows nothing."""
    return contextlib.nullcontext(lambda characters: None)


@dataclass(frozen=True)
class Cache:
    """The folder data.cache, and how work in it is done: `progress` shows it."""

    folder: Path
    progress: Progress
    believe_since_ns: int = 0
    """Records of readings that began earlier (time.time_ns()) are not believed: what --rehash asks for. 0: all are."""

    def waiting(self, what: str) -> AbstractContextManager[Advance]:
        """Around the time in which this process waits until another has done `what`: says so."""
        said = f"waiting for another process: {what}"
        logging.getLogger(__name__).info(said)
        return self.progress(said)

    def remembered(self, kind: str, files: Sequence[Path], what: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `find` finds by reading `files`: from the record of this `kind`, or found now by one of all processes that ask.

        `what` is what `find` does, in words. An error of `find` leaves no record.
        """
        asked = time.time_ns()
        paths = [os.path.abspath(file) for file in files]
        name = re.sub(r"[^A-Za-z0-9_.]+", "-", files[0].name)[-40:]
        which = hashlib.sha256("\0".join(paths).encode()).hexdigest()[:16]
        record = self.folder / f"{kind}-{name}-{which}.json"
        found = self._believed(record, paths, asked)
        if found is not None:
            return found
        with locked(record.with_suffix(".lock"), functools.partial(self.waiting, what)):
            found = self._believed(record, paths, asked)
            if found is None:
                seen = _seen(paths)
                if sum(size for _, size, _ in seen) > LONG:
                    young = max(changed for _, _, changed in seen) + SETTLED_NS - time.time_ns()
                    time.sleep(min(max(young + 10**6, 0), SETTLED_NS) / 1e9)
                began, seen = time.time_ns(), _seen(paths)
                found = find()
                write_json(record, {"files": seen, "began_ns": began, "found": found})
        return found

    def _believed(self, record: Path, paths: list[str], asked: int) -> dict[str, Any] | None:
        """What a record says; None if there is none, the files have changed, or it cannot be believed."""
        try:
            table = read_json(record)
            began, found = int(table["began_ns"]), dict(table["found"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        seen = _seen(paths)
        if table.get("files") != seen:
            return None
        settled = max(changed for _, _, changed in seen) + SETTLED_NS < began and not self.believe_since_ns
        # a reading that began after this process asked has seen what this process would see
        return found if settled or began >= (self.believe_since_ns or asked) else None


def _seen(paths: list[str]) -> list[list[Any]]:
    """[path, size, modification time in ns] of each file."""
    return [[path, status.st_size, status.st_mtime_ns] for path in paths for status in [os.stat(path)]]
