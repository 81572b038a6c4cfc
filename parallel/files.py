"""Files and folders that appear completely or not at all, and reach the disk: atomic rename, fsync, lock, SHA-256, JSON, free space.

Several processes may want to write the same file at the same moment. Whatever is written here goes to a temporary name first and
gets its own name by one rename, so that a reader never sees a part of it. Imports no torch.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from parallel.errors import DiskRefuses, Mistake
from parallel.regular_files import LARGEST_JSON, MOST_VALUES, open_regular, read_table

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a disk that is full, of a user's quota, and of a limit on the size of files."""
FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG})
"""Errors that do not pass by themselves."""
SHORT_WAIT = 0.5
"""Seconds for which a lock is waited for without a word."""


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """Yields a temporary file to write. On leaving, it is synced to disk and renamed to `path`; after an error it is removed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        sync_folder(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `target` that is renamed to `target` when the body ends, and removed if anything is raised.

    A Mistake if `target` exists already, or if the disk refuses.
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
        where = error.filename2 or error.filename or target  # of a copy, the file that was written
        raise Mistake(f"{where} cannot be written ({error.strerror or error}) → make room, or name another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(target: Path) -> None:
    """Raises a Mistake if there is anything at `target`."""
    if target.exists() or target.is_symlink():
        raise Mistake(f"{target} is there already → name a folder that is not, or remove it first")


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext) -> Iterator[None]:
    """Holds an exclusive lock on `path`, a file made for this and never deleted. The kernel releases it when a process dies.

    `waiting` is entered if another process keeps the lock for longer than SHORT_WAIT, and left when this one has it.

    If the file system has no locks, the body runs without one: everything made under this lock is deterministic and published by
    one rename, so two processes that make it at once waste work and do no harm.
    """
    with open(path, "ab") as file:
        with contextlib.suppress(OSError):
            if not _locked_soon(file):
                with waiting():
                    fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _locked_soon(file: IO[bytes]) -> bool:
    """Takes the lock if it is free within SHORT_WAIT seconds."""
    deadline = time.monotonic() + SHORT_WAIT
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(SHORT_WAIT / 50)


def user_path(root: Path, name: str) -> Path:
    """The path that a user has named: `~` is a home, and a relative path starts at `root`. A Mistake if no path can have this name."""
    if not name or "\0" in name:
        raise Mistake(f"{name!r} is no path → name a file or a folder")
    try:
        return Path(root) / Path(name).expanduser()
    except RuntimeError:
        raise Mistake(f"{name}: nobody here has the home {Path(name).parts[0]} → write the path in full") from None


def write_synced(path: Path, data: bytes) -> None:
    """Writes a small file, replacing an existing one, and returns once it is on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_tree(folder: Path) -> None:
    """Waits until the folder and everything in it is on disk."""
    for path in (*folder.rglob("*"), folder):
        sync_folder(path)


def sync_folder(path: Path) -> None:
    """Waits until the names in the folder `path`, or the bytes of a file, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as strict JSON (no NaN). After an error the old file is unchanged."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with published(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, at_most: int = LARGEST_JSON, most_values: int = MOST_VALUES) -> dict[str, Any]:
    """The object in a JSON file of bounded size, which may be a stranger's. If there is anything else, a Mistake names it."""
    return read_table(path, "restore it, or name another folder", at_most, most_values)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a regular file in hexadecimal. The file is read in pieces."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(folder: Path) -> int | None:
    """Bytes that this user can still write to the disk of `folder`, or of its nearest existing parent; None if the disk does not say."""
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(place)
            return usage.free if usage.total else None
    return None


def megabytes(count: int) -> str:
    """'1,234.5 MB'."""
    return f"{count / 1e6:,.1f} MB"


@contextlib.contextmanager
def disk_trouble(path: Path, need: int) -> Iterator[None]:
    """Turns an OSError raised while `path` is written into a Mistake with the bytes needed and the bytes free."""
    try:
        yield
    except OSError as error:
        free = free_bytes(path.parent)
        have = "nobody can tell how much its disk has free" if free is None else f"its disk has {megabytes(free)} free"
        kind = Mistake if error.errno in FORBIDDEN else DiskRefuses
        raise kind(
            f"{error.filename or path} cannot be written, {error.strerror or error}: the checkpoint needs {megabytes(need)}, {have} "
            "→ make room there, or write to another folder"
        ) from error
