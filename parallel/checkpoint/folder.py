"""A run's folder of checkpoints: publishes them by one rename, finds the latest, deletes old ones. One process at a time may write it.

checkpoints/step_000300/             complete, like every folder without a leading dot
checkpoints/latest                   a file with the name of the newest checkpoint
checkpoints/.step_000400.partial     being written, or left by a killed writer; the next save removes it
checkpoints/.step_000300.replaced    the older checkpoint of the same step, until the newer one is in its place
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
from parallel.regular_files import open_regular

MANIFEST = "manifest.json"
LATEST = "latest"
STEP = re.compile(r"step_(\d{1,15})")
LEFT_BEHIND = re.compile(r"\.(.+)\.(partial|replaced|deleted)")


def begin(folder: Path, need: int) -> Path:
    """Creates the empty hidden folder in which `folder` is written, and removes what killed writers left beside it.

    `need`: bytes that it will hold. A Mistake if there is no room for them, or no permission to write.
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
    """Writes the manifest into `partial`, renames it to `folder`, points `latest` at it; each step is on disk before the next.

    An older checkpoint of the same step is replaced, which takes two renames; between them, `latest` finds the older one under its
    hidden name.
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
    shutil.rmtree(replaced, ignore_errors=True)  # a reader keeps the files it has open, and gets an error when it opens another


def point_latest(folder: Path) -> None:
    """Makes `latest` name `folder`, atomically."""
    pointer = folder.with_name(".latest.partial")
    write_synced(pointer, folder.name.encode())
    pointer.replace(folder.with_name(LATEST))
    sync_folder(folder.parent)


def clear_leftovers(checkpoints: Path) -> None:
    """Removes what killed writers left. A `.replaced` without its successor is put back: it is the only checkpoint of its step."""
    for path in checkpoints.iterdir():
        match = LEFT_BEHIND.fullmatch(path.name)
        if match and match[2] == "replaced" and not path.with_name(match[1]).exists():
            path.rename(path.with_name(match[1]))
        elif match:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def name_of(step: int) -> str:
    """The folder name of the checkpoint after `step` steps: 'step_000300'."""
    return f"step_{step:06d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's folder name; −1 if it is not called step_N."""
    match = STEP.fullmatch(path.name)
    return int(match[1]) if match else -1


def latest(checkpoints: Path) -> Path:
    """The checkpoint that `latest` names. If it names none, a Mistake names the newest complete one."""
    pointer = checkpoints / LATEST
    newest = newest_complete(checkpoints)
    if not pointer.exists():  # a writer that was killed between its rename and its pointer leaves one without the other
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
    """The complete checkpoint with the highest step, or None."""
    return max(steps(checkpoints), key=step_of, default=None)


def steps(checkpoints: Path) -> list[Path]:
    """The complete checkpoints, which are called step_N and have a manifest, in order of N; [] if the folder cannot be read."""
    complete: list[Path] = []
    with contextlib.suppress(OSError):
        complete = [path for path in checkpoints.iterdir() if STEP.fullmatch(path.name)]
    return sorted(filter(_has_manifest, complete), key=step_of)


def _has_manifest(path: Path) -> bool:
    """Whether the folder has one; False for a folder that may not be read, too."""
    with contextlib.suppress(OSError):
        return (path / MANIFEST).is_file()
    return False


def retain(checkpoints: Path, keep_last: int, keep_every: int = 0, in_use: Collection[str] = ()) -> list[str]:
    """Deletes older checkpoints and returns the names of the deleted ones. One process does this for all ranks.

    It keeps the newest `keep_last` (≥ 1), every step that `keep_every` divides (0: none), the one that `latest` names, the names
    `in_use`, whatever is not called step_N, and every checkpoint that a process on this file system holds open with a Reader.
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
    """Hides the checkpoint, then removes it. Returns False, and does nothing, if a process reads it or the disk refuses."""
    gone = hidden(folder, "deleted")
    try:
        with unused(folder) as free:
            if free:
                folder.rename(gone)
                shutil.rmtree(gone)
            return free
    except OSError:  # at worst half deleted and hidden: the next save deletes the rest
        return not folder.exists()


def hold(folder: Path) -> IO[bytes]:
    """Opens the manifest of a checkpoint and marks it as in use until the returned file is closed or this process dies.

    This is an advisory lock (flock), shared by all readers. On a file system without locks, `retain` cannot know of readers.
    """
    file = open_regular(folder / MANIFEST)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise Mistake(f"{folder} is being deleted, as an older checkpoint of its run → use a newer one") from None
    except OSError:
        pass
    return file


def still_there(folder: Path, held: IO[bytes]) -> bool:
    """Whether `folder` is still the checkpoint whose manifest is held, and not another one of the same name."""
    try:
        return os.path.samestat((folder / MANIFEST).stat(), os.fstat(held.fileno()))
    except OSError:
        return False


@contextlib.contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Yields whether no process holds the checkpoint; inside the `with` block none can begin to. OSError if it has no manifest."""
    with (folder / MANIFEST).open("r+b") as file:  # over NFS an exclusive lock needs a file that is open for writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True


def hidden(folder: Path, state: str) -> Path:
    """The path of `folder` while its state is "partial", "replaced" or "deleted"."""
    return folder.with_name(f".{folder.name}.{state}")


def _pointed(pointer: Path) -> str:
    """The name in a `latest` file, empty if it cannot be read."""
    try:
        with open_regular(pointer) as file:
            return file.read(256).decode(errors="replace").strip()
    except OSError:
        return ""
