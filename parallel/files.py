"""Files that several processes may want to write at the same moment: made by one, seen whole or not at all."""
# MERGED-DOC """A folder that appears whole or not at all."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parallel.checkpoint.manifest import File
from parallel.errors import Mistake


def sha256_of(path: Path) -> str:
    """Of a whole file, read piecewise."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, data: bytes) -> File:
    """A small file, on disk when this returns; replaces one that is there."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return File(len(data), hashlib.sha256(data).hexdigest())


def sync_folder(folder: Path) -> None:
    """Waits until the names in `folder` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_trouble(path: Path, need: int) -> Iterator[None]:
    """Turns the OSErrors of writing `path` into a Mistake with the bytes needed and those the disk has."""
    try:
        yield
    except OSError as error:
        free = free_bytes(path.parent)
        have = "nobody can tell how much its disk has free" if free is None else f"its disk has {megabytes(free)} free"
        raise Mistake(
            f"{error.filename or path} cannot be written, {error.strerror or error}: the checkpoint needs {megabytes(need)}, {have} "
            "→ make room there, or write to another folder"
        ) from error


def free_bytes(folder: Path) -> int | None:
    """What this user may still write to the disk of `folder`, or of the nearest one above that is there; None where nobody can tell."""
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(place)
            return usage.free if usage.total else None
    return None


def megabytes(count: int) -> str:
    """'1,234.5 MB'."""
    return f"{count / 1e6:,.1f} MB"


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


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as strict JSON (no NaN), or leave it as it was."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with published(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `target` that gets its name by one rename when the body ends; whatever is raised, it is gone.

    A Mistake where something is there already.
    """
    refuse_existing(target)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        sync_folder(partial)
        refuse_existing(target)
        partial.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        where = error.filename2 or error.filename or target  # of a copy the second
        raise Mistake(f"{where} cannot be written ({error.strerror or error}) → make room, or name another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(target: Path) -> None:
    """A Mistake where something lies at `target`."""
    if target.exists() or target.is_symlink():
        raise Mistake(f"{target} is there already → name a folder that is not, or remove it first")
