"""A folder that appears whole or not at all."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from parallel.checkpoint_file import sync_folder
from parallel.errors import Mistake


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
