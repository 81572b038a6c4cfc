"""A run's folder of checkpoints: publishes them by one rename, finds the latest, deletes old ones. One process at a time may write it.

checkpoints/step_000300/             complete, like every folder without a leading dot
checkpoints/latest                   a file with the name of the newest checkpoint
checkpoints/step_000200.damaged      found damaged, and set aside
checkpoints/.step_000400.partial     being written, or left by a killed writer; the next save removes it
checkpoints/.step_000300.replaced    the older checkpoint of the same step, until the newer one is in its place
checkpoints/.step_000100.deleted     being deleted
"""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO

from parallel.checkpoint.damage import damage_of
from parallel.checkpoint.manifest import FILE_NAME, MANIFEST
from parallel.errors import DiskRefuses, Mistake
from parallel.files import disk_trouble, free_bytes, megabytes, sync_folder, write_synced
from parallel.regular_files import open_regular

LATEST = "latest"
STEP = re.compile(r"step_(\d{1,15})")
DAMAGED = ".damaged"
"""The end of the name of a damaged checkpoint that was set aside: it is not step_N any more, so nothing reads, counts or deletes it."""
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
            raise DiskRefuses(f"{folder} needs {megabytes(need)}, its disk has {megabytes(free)} free → make room, or write elsewhere")
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


def up_to_latest(checkpoints: Path) -> list[Path]:
    """The complete checkpoints up to the one that `latest` names, in order; all of them if it names none.

    Later ones belong to a future that the run has left, because it was resumed from an older checkpoint on purpose.
    """
    complete = steps(checkpoints)
    pointed = checkpoints / _pointed(checkpoints / LATEST)
    return [path for path in complete if step_of(path) <= step_of(pointed)] if pointed in complete else complete


def newest_whole(candidates: Iterable[Path], hashes: bool = False) -> tuple[Path | None, dict[Path, str]]:
    """The newest of the checkpoints that is whole, None if none is; and the newer ones, with what is damaged in each."""
    damaged: dict[Path, str] = {}
    for checkpoint in sorted(candidates, key=step_of, reverse=True):
        if not (damage := damage_of(checkpoint, hashes)):
            return checkpoint, damaged
        damaged[checkpoint] = damage
    return None, damaged


def set_aside(damaged: Iterable[Path]) -> None:
    """Renames damaged checkpoints to step_N.damaged, and makes `latest` name the newest one that is left. Rank 0 only.

    A name that is taken gets a number behind it. A disk that refuses keeps the old names.
    """
    for checkpoint in damaged:
        with contextlib.suppress(OSError):
            target, number = checkpoint.with_name(checkpoint.name + DAMAGED), 1
            while target.exists():
                number += 1
                target = checkpoint.with_name(f"{checkpoint.name}{DAMAGED}-{number}")
            checkpoint.rename(target)
            newest = newest_complete(checkpoint.parent)
            if newest:
                point_latest(newest)
            else:
                checkpoint.with_name(LATEST).unlink(missing_ok=True)


def retain(checkpoints: Path, keep_last: int, keep_every: int = 0, in_use: Collection[str] = ()) -> list[str]:
    """Deletes older checkpoints and returns the names of the deleted ones. One process does this for all ranks.

    It keeps the newest `keep_last` (≥ 1) that are whole and whatever is newer than the oldest of them, every step that `keep_every`
    divides (0: none), the one that `latest` names, the names `in_use`, whatever is not called step_N, and every checkpoint that a
    process on this file system holds open with a Reader.
    """
    if keep_last < 1 or keep_every < 0:
        what = f"the last {keep_last} checkpoints and every {keep_every}th step's cannot be kept"
        raise Mistake(f"{what} → keep the last 1 or more, and every 0th (none), 1st, 2nd, …")
    complete = steps(checkpoints)
    kept, whole = set(in_use), 0
    for path in reversed(complete):
        if whole == keep_last:
            break
        kept.add(path.name)  # a damaged one, too: it does not count, and whoever finds the damage may need it
        whole += not damage_of(path)
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
