"""Exit codes of a run, and how a Mistake ends a process: one sentence on standard error, from one rank."""

import sys
import time
from typing import IO

from parallel.errors import Mistake

SIGNALLED = 128
"""Exit code of a run that a signal ended: 128 + the signal's number, as shells report it."""


HUNG = 124
"""Exit code of a run that was ended because nothing moved: what timeout(1) returns."""


WATCHED = 3
"""Exit code of a run that stopped itself: a loss or gradient that is not finite, too many skipped steps, a spike."""


PATIENCE = 20.0
"""Seconds that ranks > 0 leave to rank 0 to say what is wrong, before its exit makes the launcher end them."""
WRONG = 2
"""Exit code of a Mistake."""


def refuse(mistake: Mistake, rank: int, patience: float = PATIENCE) -> None:
    """Say it on rank 0 and leave. Others wait: a launcher that sees them leave first would end rank 0 unheard.

    One that is still there after `patience` seconds was not ended by a rank 0 that knew, so it speaks for itself.
    """
    if rank > 0:
        time.sleep(patience)
    who = f"(rank {rank}) " if rank > 0 else ""
    sys.stderr.write(f"error  {who}{mistake}\n")
    sys.stderr.flush()
    raise SystemExit(WRONG)


def show_mistake(mistake: Mistake, stream: IO[str] | None = None) -> None:
    """`error  <sentence>`, the only thing a user sees of a mistake."""
    print(f"error  {mistake}", file=stream or sys.stderr, flush=True)
