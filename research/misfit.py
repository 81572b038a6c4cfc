"""A type error in the words of the code under test: what was done to what, why that does not fit, on which line, in which modules."""

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from torch import nn

CHECKING = ("misfit", "typed_collectives", "typed_functions", "typed_pass", "typed_recompute", "verify_types")
HERE = Path(__file__).resolve().parent
CHECKER = {str(HERE / f"{name}.py") for name in CHECKING}
CHECKER |= {str(HERE.parent / "parallel" / "collectives.py")}
"""Files that stand in a stack because they check; and parallel/collectives.py: it is its caller's choice of a pair that fits or not."""
LIBRARIES = ("<", *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))


class Misfit(Exception):
    """Raised where it happens: the stack says `source`, file:line of the code under test, and `modules`, innermost first.

    `at`: the line, where it is not the one at hand; "" for what has none.
    """

    def __init__(self, what: str, why: str, at: str | None = None) -> None:
        super().__init__(f"{what}: {why}")
        self.what, self.why, self.source = what, why, source() if at is None else at
        selves = (frame.f_locals.get("self") for frame in _frames())
        self.modules = [found for found in selves if isinstance(found, nn.Module)]


def source() -> str:
    """file:line of the innermost frame that belongs to the code under test."""
    return next((f"{frame.f_code.co_filename}:{frame.f_lineno}" for frame in _frames() if _is_under_test(frame.f_code.co_filename)), "")


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_under_test(file: str) -> bool:
    return file not in CHECKER and not file.startswith(LIBRARIES)
