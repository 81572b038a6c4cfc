"""How much memory this rank has used."""

import resource
import sys

import torch


def peak_memory_mb() -> float:
    """The largest so far in MB (1e6 bytes): allocated on its GPU where there is one, else resident memory of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
