"""One of the ablations that are shipped, trained again: its committed verdict is what comes out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from research import ROOT
from research.config.experiment_folder import RESULTS

SHIPPED = "gpt_sotu_untied"


@pytest.mark.slow
def test_the_committed_verdict_is_reproduced(tmp_path: Path) -> None:
    """Six runs of 270 steps. Other processors round differently, so the verdict and the sign are compared, and the size roughly."""
    committed = json.loads((ROOT / "experiments" / SHIPPED / RESULTS / "ablation.json").read_text())
    settings = ["--track.runs", str(tmp_path / "runs"), "--track.mode", "disabled"]
    words = ["ablate", SHIPPED, "--jobs", "2", "--out", str(tmp_path / "out"), "--json", "--", *settings]
    finished = subprocess.run([sys.executable, "-m", "research", *words], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    (found,) = json.loads(finished.stdout)
    assert found["verdict"] == committed["verdict"] != "not distinguishable"
    assert found["pairs"] == committed["pairs"] == 3
    assert found["difference"] == pytest.approx(committed["difference"], rel=0.3)
