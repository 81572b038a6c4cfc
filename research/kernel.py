"""Two requests to Linux about processes whose parent dies. Elsewhere they are not granted."""

import ctypes
import sys

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def tell_of_parents_death(number: int) -> None:
    """This process gets the signal when its parent dies, whatever it is then busy with; by default it ends at once."""
    _prctl(PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Whoever below this process loses its parent becomes this process's child, so that it can be found."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
