"""A run's folder of checkpoints: begun hidden, published by one rename, found again, kept or deleted. One process at a time writes it.

checkpoints/step_000300/             complete, as every folder without a leading dot
checkpoints/latest                   a file that holds the newest one's name
checkpoints/.step_000400.partial     being written, or what a killed writer left; the next save removes it
checkpoints/.step_000300.replaced    the older of the same step, until a newer has its place
checkpoints/.step_000100.deleted     being deleted
"""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

from parallel.checkpoint.manifest import FILE_NAME
from parallel.errors import Mistake
from parallel.files import disk_trouble, free_bytes, megabytes, sync_folder, write_synced

MANIFEST = "manifest.json"
LATEST = "latest"
STEP = re.compile(r"step_(\d{1,15})")
LEFT_BEHIND = re.compile(r"\.(.+)\.(partial|replaced|deleted)")


def begin(folder: Path, need: int) -> Path:
    """The empty hidden folder in which `folder` is written; what killed writers left beside it is cleared away.

    `need`: bytes that it will hold. A Mistake where there is no room for them, or no right to write.
    """
    partial = hidden(folder, "partial")
    with disk_trouble(partial, need):
        folder.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder.parent)
        free = free_bytes(folder.parent)
        if free is not None and free < need:
            raise Mistake(f"{folder} needs {megabytes(need)}, its disk has {megabytes(free)} free → make room, or write elsewhere")
        partial.mkdir()
    return partial


def publish(partial: Path, folder: Path, manifest: str) -> None:
    """Completes `partial` with its manifest, gives it its name by one rename, points `latest` at it; each on disk before the next.

    The same step saved before gives way; between the two renames that takes, `latest` finds the older one under its hidden name.
    """
    replaced = hidden(folder, "replaced")
    with disk_trouble(partial, len(manifest)):
        write_synced(partial / MANIFEST, manifest.encode())
        sync_folder(partial)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        sync_folder(folder.parent)
        point_latest(folder)
    shutil.rmtree(replaced, ignore_errors=True)  # a reader of it keeps the files it has open, and is told when it opens another


def point_latest(folder: Path) -> None:
    """Makes `folder` the one that `latest` names, atomically."""
    pointer = folder.with_name(".latest.partial")
    write_synced(pointer, folder.name.encode())
    pointer.replace(folder.with_name(LATEST))
    sync_folder(folder.parent)


def clear_leftovers(checkpoints: Path) -> None:
    """Removes what killed writers left. A `.replaced` whose successor never came is put back: it is the only one of its step."""
    for path in checkpoints.iterdir():
        found = LEFT_BEHIND.fullmatch(path.name)
        if found and found[2] == "replaced" and not path.with_name(found[1]).exists():
            path.rename(path.with_name(found[1]))
        elif found:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def name_of(step: int) -> str:
    """'step_000300': the folder's name of the checkpoint after so many steps."""
    return f"step_{step:06d}"


def step_of(path: Path) -> int:
    """The steps that a checkpoint's folder name says; −1 where it is not called step_N."""
    found = STEP.fullmatch(path.name)
    return int(found[1]) if found else -1


def latest(checkpoints: Path) -> Path:
    """The checkpoint that `latest` names. A Mistake names the newest complete one where it names none."""
    pointer = checkpoints / LATEST
    newest = newest_complete(checkpoints)
    if not pointer.exists():  # a writer killed between its rename and its pointer leaves one without the other
        if newest is None:
            raise Mistake(f"{checkpoints} holds no complete checkpoint → a run writes its first one when it ends")
        return newest
    name = _pointed(pointer)
    for path in (checkpoints / name, hidden(checkpoints / name, "replaced")) if FILE_NAME.fullmatch(name) else ():
        if (path / MANIFEST).is_file():
            return path
    way_out = f"write {newest.name} into it, the newest complete one" if newest else "no checkpoint there is complete"
    raise Mistake(f"{pointer} names {name!r:.80}, which is not a checkpoint beside it → {way_out}")


def newest_complete(checkpoints: Path) -> Path | None:
    """Of the folders called step_N that have a manifest, that of the highest N."""
    return max(steps(checkpoints), key=lambda path: step_of(path), default=None)


def steps(checkpoints: Path) -> list[Path]:
    """The complete checkpoints that are called step_N, in order of N."""
    found = [path for path in _entries(checkpoints) if STEP.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: step_of(path))


def retain(checkpoints: Path, keep_last: int, keep_every: int = 0, in_use: Collection[str] = ()) -> list[str]:
    """Deletes older checkpoints, one process for all ranks; returns the names of those that are gone.

    Kept are the newest `keep_last` (≥ 1), every step that `keep_every` divides (0: none), what `latest` names, the names
    `in_use`, whatever is not called step_N, and what any process on this file system holds open with a Reader.
    """
    if keep_last < 1 or keep_every < 0:
        what = f"the last {keep_last} checkpoints and every {keep_every}th step's cannot be kept"
        raise Mistake(f"{what} → keep the last 1 or more, and every 0th (none), 1st, 2nd, …")
    complete = steps(checkpoints)
    kept = {path.name for path in complete[-keep_last:]} | set(in_use)
    if (checkpoints / LATEST).is_file():
        kept.add(_pointed(checkpoints / LATEST))
    old = [path for path in complete if path.name not in kept and not (keep_every and step_of(path) % keep_every == 0)]
    return [path.name for path in old if _delete(path)]


def _delete(folder: Path) -> bool:
    """Hides the checkpoint, then removes it; False, and nothing happens, where someone reads it or the disk refuses."""
    gone = hidden(folder, "deleted")
    try:
        with unused(folder) as free:
            if free:
                folder.rename(gone)
                shutil.rmtree(gone)
            return free
    except OSError:  # half deleted at worst, and hidden: the next save goes on with it
        return not folder.exists()


def hold(folder: Path) -> IO[bytes]:
    """Opens the manifest of a checkpoint and marks it as in use until the returned file is closed or this process dies.

    An advisory lock (flock), shared by all readers. Where the file system has none, `retain` cannot know of its readers.
    """
    file = (folder / MANIFEST).open("rb")
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise Mistake(f"{folder} is being deleted, as an older checkpoint of its run → use a newer one") from None
    except OSError:
        pass
    return file


def still_there(folder: Path, held: IO[bytes]) -> bool:
    """Whether `folder` is still the checkpoint whose manifest is held, and not another of the same name."""
    try:
        return os.path.samestat((folder / MANIFEST).stat(), os.fstat(held.fileno()))
    except OSError:
        return False


@contextlib.contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Yields whether no process holds the checkpoint; inside, none can begin to. OSError where it has no manifest."""
    with (folder / MANIFEST).open("r+b") as file:  # over NFS an exclusive lock asks for a file that is open for writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True


def hidden(folder: Path, state: str) -> Path:
    """Where `folder` lies while it is partial, replaced or deleted."""
    return folder.with_name(f".{folder.name}.{state}")


def _pointed(pointer: Path) -> str:
    try:
        with pointer.open("rb") as file:
            return file.read(256).decode(errors="replace").strip()
    except OSError:
        return ""


def _entries(checkpoints: Path) -> list[Path]:
    try:
        return list(checkpoints.iterdir())
    except OSError:
        return []
