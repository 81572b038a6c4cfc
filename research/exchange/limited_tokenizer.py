"""Limits of what a stranger's tokenizer may take, and a trial of one within them, in a child process. Imports no torch.

A tokenizer is a program of a kind: its normaliser can make gigabytes of one letter, and its regular expressions may never end.
"""

from pathlib import Path

from research.cluster.limited_process import run_limited
from research.data import tokenizer_file
from research.data.tokenizer import known_letters

CPU_SECONDS, CPU_SECONDS_PER_MB = 3.0, 3.0
MEMORY, MEMORY_PER_BYTE = 192 * 2**20, 64
"""What the child may use, at least and for what is read. A tokenizer.json of 1,000 tokens took 0.1 s and 5 MB; one of
128 thousand tokens (10 MB) 7 s and 219 MB."""
TRIAL = "The people of the Union, 1861–1865: it's “peace” in 12 states… ½ naïve 漢字\n\n\tdef f(x): return x**2  # 100%\n"


def limits(num_bytes: int) -> tuple[float, int]:
    """(CPU seconds, bytes of memory) that the child may use for a tokenizer of `num_bytes`."""
    return CPU_SECONDS + CPU_SECONDS_PER_MB * num_bytes / 1e6, MEMORY + MEMORY_PER_BYTE * num_bytes


def try_tokenizer(name: str, root: Path, way_out: str) -> None:
    """Loads a tokenizer.json in the child, and encodes and decodes a text. A Mistake if it needs more than it may. Built-in ones pass."""
    if not tokenizer_file.is_file(name):
        return
    import tokenizers  # noqa: F401  # what the library itself takes is not the tokenizer's

    path = tokenizer_file.path_of(name, root)

    def use() -> None:
        tokenizer = tokenizer_file.load(name, root)
        tokenizer.decode(tokenizer.encode(known_letters(tokenizer.backend, TRIAL)))

    run_limited(use, f"the tokenizer {path}", way_out, *limits(path.stat().st_size if path.is_file() else 0))
