"""A tokenizer and data for tasks, once for all."""

from pathlib import Path

import pytest

from research import ROOT
from research.config import serialization
from research.data.prepare import load_tokenizer
from research.evaluation.task import TaskContext
from research.tracking.run_folder import RunFolder
from tests.research.helpers import untrained

SHARED = ROOT.parent / "shared" / "data"
"""WikiText-2 and LAMBADA, where they are at hand: they may not go into the repository."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> RunFolder:
    """A run that was never trained."""
    return untrained.make(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="session")
def given(folder: RunFolder) -> TaskContext:
    data = serialization.load(folder.config).data
    return TaskContext(load_tokenizer(data, Path("/")), 33, data, Path("/"))


def shared(name: str) -> Path:
    """A file of the shared data; skips where it is not at hand."""
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not at hand")
    return SHARED / name
