"""From a question to a verdict, as a user goes: fork, check, sweep, compare, ablate, tree, in a tree of its own, with real runs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from research import ROOT
from research.tracking import run_folder
from tests.research.ablation.test_lineage import edit
from tests.research.ablation.test_sweep import TINY
from tests.research.helpers.warm_launcher import warm_launcher

CODE = ("models", "parallel", "research")


def research(tree: Path, *words: str, code: int = 0) -> str:
    """What `python -m research` prints in the tree."""
    finished = subprocess.run([sys.executable, "-m", "research", *words], cwd=tree, capture_output=True, text=True, timeout=120)
    assert finished.returncode == code, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a user clones, with one experiment."""
    for name in (*CODE, "experiments/gpt_sotu"):  # with its bytecode, or each process would compile everything
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".*"))
    return tmp_path


@pytest.fixture
def launcher(tree: Path) -> Iterator[str]:
    """What starts the trials of a sweep without the seconds of their imports."""
    with warm_launcher(tree) as words:
        yield words


@pytest.mark.slow
def test_fork_sweep_compare(tree: Path, launcher: str) -> None:
    """Four runs of 12 steps, two for each side: a learning rate that is much too low is worse, also by the report that is kept."""
    research(tree, "fork", "experiments/gpt_sotu", "experiments/low", "--set", "optimizer.lr=1e-6", "--set", "optimizer.min_lr=1e-7")
    research(tree, "check")
    for name in ("gpt_sotu", "low"):
        said = research(tree, "sweep", f"experiments/{name}", "--seeds", "2", "--jobs", "2", "--launcher", launcher, "--", *TINY)
        assert said.count("done in") == 2, said
    said = research(tree, "compare", "gpt_sotu", "low")
    (verdict,) = (line for line in said.splitlines() if line.startswith("verdict"))
    assert verdict.startswith("verdict  low is worse than gpt_sotu: +"), said

    # the same by one command, which trains nothing again
    (result,) = json.loads(research(tree, "ablate", "low", "--seeds", "2", "--json", "--", *TINY))
    assert result["verdict"] == "worse" and result["sentence"] in verdict and result["settings"] == list(TINY)
    assert len(run_folder.every(tree / "runs")) == 4
    assert "worse by +" in research(tree, "tree")
    written = {path.name for path in (tree / "experiments" / "low" / "results").iterdir()}
    assert written == {"ablation.json", "compare.md", "differences.csv", "runs.csv"} | {
        f"{name}_{theme}.svg" for name in ("curves", "differences") for theme in ("light", "dark")
    }

    # a second change is flagged by `check`; at the top of a report it is in test_comparison.py
    edit(tree / "experiments" / "low" / "config.py", "clip=1.0", "clip=0.5")
    wrong = "experiments/low differs from gpt_sotu in optimizer.clip 1.0 → 0.5, which changes does not declare"
    assert wrong in research(tree, "check", "low", code=1)
