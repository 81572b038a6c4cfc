"""The limit on the C library's heaps: glibc's own description of its heaps says how many there are."""

import ctypes
import subprocess
import sys

import pytest

from research import ROOT

USES_THREADS = """
import ctypes, os, sys, threading
from research.cluster.memory import limit_heaps
if sys.argv[1:]:
    limit_heaps(int(sys.argv[1]))
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
all_have = threading.Barrier(6)

def work():
    library.malloc(1000)
    all_have.wait()

threads = [threading.Thread(target=work) for _ in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
library.fdopen.restype = ctypes.c_void_p
library.malloc_info(0, ctypes.c_void_p(library.fdopen(1, b"w")))
library.fflush(None)
"""


def heaps(*arguments: str) -> int:
    done = subprocess.run([sys.executable, "-c", USES_THREADS, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.count("<heap nr=")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="not glibc")
def test_threads_share_the_heaps_that_there_may_be():
    assert heaps("2") == 2 < heaps()
