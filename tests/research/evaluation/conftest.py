"""A run that was never trained, and its tokenizer and data for tasks."""

import os
from pathlib import Path
from unittest import mock

import pytest

from research import ROOT
from research.config import serialization
from research.data.run_tokenizer import load_tokenizer
from research.evaluation import lm_eval_task
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


@pytest.fixture(scope="module")
def lm_eval_offline(tmp_path_factory):
    """lm_eval without network access, and without the report on the machine that it adds to results: a second of `pip list` each."""
    pytest.importorskip("lm_eval")
    with mock.patch.dict(os.environ):
        lm_eval_task.keep_offline(tmp_path_factory.mktemp("cache"))
        with mock.patch("lm_eval.evaluator.add_env_info"):
            yield


def shared(name: str) -> Path:
    """A file of the shared data; skips the test if it is not available."""
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not available")
    return SHARED / name
