"""A tree with copies of four shipped experiments, in which forks can be made."""

import shutil
from pathlib import Path

import pytest

from research import ROOT
from research.ablation import lineage


@pytest.fixture
def experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """experiments/ of a tree of its own, which is the working directory and where bare names are looked for."""
    (tmp_path / "research").mkdir()
    (tmp_path / "research" / "launch.py").touch()
    for name in ("gpt_sotu", "gpt_sotu_3d", "gpt_sotu_dyt", "llama_sotu"):
        shutil.copytree(ROOT / "experiments" / name, tmp_path / "experiments" / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lineage.folder_of, "__defaults__", (tmp_path / "experiments",))
    return tmp_path / "experiments"
