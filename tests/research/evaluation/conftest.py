"""A run that was never trained, and its tokenizer and data for tasks."""

from pathlib import Path

import pytest

from research import ROOT
from research.config import serialization
from research.data.prepare import load_tokenizer
from research.evaluation.task import TaskContext
from research.tracking.run_folder import RunFolder
from tests.research.helpers import untrained

SHARED = ROOT.parent / "shared" / "data"
"""WikiText-2 and LAMBADA, if they are available: their licences keep them out of the repository."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> RunFolder:
    return untrained.make(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="session")
def context(folder: RunFolder) -> TaskContext:
    data = serialization.load(folder.config).data
    return TaskContext(load_tokenizer(data, Path("/")), 33, data, Path("/"))


def shared(name: str) -> Path:
    """A file of the shared data; skips the test if it is not available."""
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not available")
    return SHARED / name
