"""The resident memory of this process: what it holds, what of that was there before the model, and the peak of both.

600–1,000 MB of a rank are libraries that Python imports. `HostMemory` is made before the model is built, so that what the run adds can be
told from them. Torch is not imported here.
"""

import contextlib
import ctypes
import re
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import psutil

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What Linux takes in `CLEAR` to set a process's peak to what is resident now."""
MB = 1e6
ARENA_MAX = -8
"""glibc's M_ARENA_MAX, the parameter of mallopt that MALLOC_ARENA_MAX sets, too."""


class Resident(NamedTuple):
    """Resident memory in MB (1e6 bytes)."""

    now: float
    peak: float
    """Since the start of the process; on Linux, since `HostMemory` was made last."""


def resident() -> Resident:
    """What this process holds, and the most that it held."""
    with contextlib.suppress(OSError, KeyError):
        kilobytes = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", STATUS.read_text(encoding="ascii", errors="replace"), re.MULTILINE))
        return Resident(*(int(kilobytes[name]) * 1024 / MB for name in ("VmRSS", "VmHWM")))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on other systems
    return Resident(psutil.Process().memory_info().rss / MB, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB)


class HostMemory:
    """What this process has added to its resident memory since this object was made, in MB (1e6 bytes).

    Resident are also the pages of mapped files that were touched, such as a token store's: the kernel may take those back at any time.
    """

    def __init__(self) -> None:
        self.before, self._peak_before = resident()
        with contextlib.suppress(OSError):  # where the kernel does not do it, the mark stays
            CLEAR.write_text(RESET_PEAK)
        self._mark = resident().peak
        self._most = self.before
        self._malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def row(self) -> dict[str, float]:
        """The keys of metrics.jsonl: what the process holds, what it has added, and the peak of that, for this rank.

        The peak is the kernel's if its mark has moved since this object was made, else the largest value that was read.
        """
        now, mark = resident()
        self._most = max(self._most, now, mark if mark > self._mark else now)
        return {"mem/host_mb": now, "mem/host_added_mb": now - self.before, "mem/host_added_peak_mb": self._most - self.before}

    def trim(self) -> None:
        """Returns the free pages of the C library's heap to the kernel. Does nothing where the library cannot do that (only glibc can).

        glibc keeps what is freed between blocks that are in use. In fp32 a DeepSpeed engine frees and allocates every gradient in every
        step, and a rank's resident memory grew by hundreds of MB that nothing used (`python benchmarks/memory.py`).
        """
        if self._malloc_trim is not None:
            self._malloc_trim(0)

    def peak(self) -> float:
        """The most that the process held since its start."""
        return max(self._peak_before, resident().peak)


def limit_heaps(most: int) -> None:
    """Limits the heaps that the C library makes for threads. Does nothing where the library has no such limit (only glibc has).

    glibc makes up to eight heaps per core. What one thread frees stays in its heap, so a server whose threads each handle a large body
    once keeps several times the memory that any of them needs. Heaps that are there already are kept.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(ARENA_MAX, most)
