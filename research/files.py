"""Files that several processes may want to write at the same moment: made by one, seen whole or not at all."""

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` (a file made for this, never deleted) exclusively; the kernel lets go when a process dies.

    Where the file system has no locks, go on without: everything made here is deterministic and published by one rename,
    so that two makers waste work and harm nothing.
    """
    with open(path, "ab") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """Write the yielded temporary file; on leaving it is on disk and then, by one rename, `path`. On an error it is gone."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
