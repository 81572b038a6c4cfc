"""Exit codes of a run, and how a Mistake ends a process: one sentence on standard error, from one rank."""

import contextlib
import re
import sys
import time
from collections.abc import Iterator

from parallel.errors import Damaged, DiskRefuses, FolderLost, Mistake, SharedMistake
from parallel.files import FULL
from parallel.text import printable

CRASHED = 1
"""Exit code of an error that is no Mistake: Python's own."""
WRONG = Mistake.code
"""Exit code of a Mistake."""
WATCHED = 3
"""Exit code of a run that stopped itself: a loss or gradient that is not finite, too many skipped steps, a spike."""
DISK = DiskRefuses.code
"""Exit code of a run whose disk is full or refuses to be written: the same command works once there is room."""
DAMAGED = Damaged.code
"""Exit code of a run whose checkpoint is damaged: an older one may be whole."""
TAKEN = FolderLost.code
"""Exit code of a run whose folder is not its own any more: it was deleted under the run, or another process has taken it over."""
NOT_AGAIN = (WRONG, WATCHED, TAKEN)
"""Exit codes that the same launch would only return again: a mistake, a run that has stopped itself, one whose folder is not its own."""
HUNG = 124
"""Exit code of a run that was ended because it made no progress: the one that timeout(1) returns."""
SIGNALLED = 128
"""Exit code of a run that a signal ended: 128 + the signal's number, as shells report it."""
LONGEST, LONGEST_SENTENCE, WAY_OUT = 300, 2000, 600
"""The most characters that an error message shows of a value without a space, such as a path; and of all, its end included."""

PATIENCE = 20.0
"""Seconds that ranks > 0 wait for rank 0 to report the error, before their own exit makes the launcher end all ranks."""


SHARED_SECONDS = 1.0
"""Seconds that a rank with nothing to report waits, so that its exit does not make a launcher end the rank that reports."""


def refuse(mistake: Mistake, rank: int, patience: float = PATIENCE) -> None:
    """Report the Mistake on rank 0 and exit. Other ranks wait: if one left first, the launcher would end rank 0 before it reports.

    A rank that still runs after `patience` seconds was not ended because of an error on rank 0, so it reports its own. It does so at
    once where that is of its own disk. A SharedMistake is known to all ranks, and to the one that reports it.
    """
    if isinstance(mistake, SharedMistake):
        if mistake.reports:
            show_mistake(mistake)
        else:
            time.sleep(SHARED_SECONDS)
        raise SystemExit(mistake.code)
    if rank > 0 and not isinstance(mistake, DiskRefuses | FolderLost):
        time.sleep(patience)
    prefix = f"(rank {rank}) " if rank > 0 else ""
    sys.stderr.write(f"error  {prefix}{sentence(mistake)}\n")
    sys.stderr.flush()
    raise SystemExit(mistake.code)


def show_mistake(mistake: Mistake) -> None:
    """`error  <sentence>`: all that a user sees of a Mistake."""
    print(f"error  {sentence(mistake)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Ends the process with the Mistake's exit code and one sentence if the body raises a Mistake: for programs without a launcher."""
    try:
        yield
    except Mistake as mistake:
        refuse(mistake, rank=0)


def sentence(mistake: Mistake | str) -> str:
    """The message on one line, safe for a terminal. Of a value that is as long as a file, its beginning and its end."""
    text = re.sub(rf"\S{{{LONGEST},}}", lambda value: f"{value[0][:60]}…{value[0][-20:]}", str(mistake))
    return printable(text, LONGEST_SENTENCE, WAY_OUT).replace("\t", "\\t").replace("\n", "\\n")


@contextlib.contextmanager
def refused_files() -> Iterator[None]:
    """Turns an error of the file system that names a file into a Mistake: a user chose the file, its name or its place."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        kind = DiskRefuses if error.errno in FULL else Mistake
        raise kind(f"{error.filename} cannot be used ({error.strerror}) → check the path, and whether you may read or write it") from error
