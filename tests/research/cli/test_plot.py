"""`python -m research plot`: which panels and names a picture has, and the mistakes that are sentences."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.errors import Mistake
from research import ROOT
from research.cli import plot
from research.config import serialization
from research.tracking import run_folder
from research.tracking.metrics import JsonLines
from research.tracking.run_folder import RunFolder
from tests.research.helpers.example import example


def run_of(place: Path, name: str, lr: float, seed: int, rows: int = 3) -> RunFolder:
    folder = run_folder.create(place, name)
    run_folder.start(folder, layout="tensor 2", precision="fp32", steps=rows)
    own = {"question": f"{lr}?", "track": {"project": f"project {seed}"}}
    serialization.save(example(optimizer={"lr": lr, "min_lr": 0.0}, seed=seed, **own), folder.config)
    file = JsonLines(folder.metrics)
    for step in range(1, rows + 1):
        axes = {"progress/step": step, "progress/tokens": 9 * step, "progress/seconds": 1.0 * step}
        file.write({**axes, "train/loss": 3.0, "train/lr": lr, "train/grad_norm": 1.0, "perf/memory_mb": 9.0})
    if rows:
        file.write(
            {**axes, "eval/agreement/accuracy": 0.5, "eval/agreement/accuracy_stderr": 0.1, "eval/agreement/accuracy/attractor": 0.5}
        )
    file.close()
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_the_names_say_what_differs(place: Path) -> None:
    a, b, c = run_of(place, "gpt", 0.003, 1), run_of(place, "gpt", 0.001, 1), run_of(place, "gpt", 0.001, 2)
    assert [curve.label for curve in plot.curves([a, b, c])] == [
        f"{a.id} · lr 0.003 · seed 1", f"{b.id} · lr 0.001 · seed 1", f"{c.id} · lr 0.001 · seed 2"
    ]  # fmt: skip
    assert [curve.label for curve in plot.curves([b, run_of(place, "llama", 0.001, 1)])][0] == b.title
    assert [curve.label for curve in plot.curves([a])] == [a.title]


def test_a_picture_of_two_runs(place: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = run_of(place, "gpt", 0.003, 1), run_of(place, "gpt", 0.001, 1)
    plot.main([str(a.path), str(b.path), str(a.path), "--out", "a.svg", "--x", "steps", "--dark"])
    keys = "train/loss, train/lr, train/grad_norm, eval/agreement/accuracy"
    assert capsys.readouterr().out == f"drawn    a.svg · 2 runs · {keys} over steps\n"
    assert b"<svg" in Path("a.svg").read_bytes()


def test_metrics_by_name_and_by_key(place: Path) -> None:
    runs = plot.curves([run_of(place, "gpt", 0.003, 1)])
    asked = ["lr", "perf/memory_mb", "train/loss", "tasks", "eval/agreement/accuracy/attractor"]
    assert [panel.key for panel in plot.panels_of(asked, runs)] == [
        "train/lr", "perf/memory_mb", "train/loss", "eval/agreement/accuracy", "eval/agreement/accuracy/attractor"
    ]  # fmt: skip


def test_mistakes_are_sentences(place: Path) -> None:
    path = str(run_of(place, "gpt", 0.003, 1).path)
    for argv, message in (
        ([path, "--metric", "grad_nrm"], "no row has the metric grad_nrm → did you mean grad_norm?"),
        ([path, "--metric", "zzzz"], "no row has the metric zzzz → use loss, lr, grad_norm, train/loss"),
        ([path, "--out", "a.jpg"], "--out a.jpg is neither PNG nor SVG → use a.png or .svg"),
        ([path, "--out", ""], "--out . is neither PNG nor SVG → use plot.png or .svg"),
        ([path, "--out", "no/a.png"], "--out no/a.png cannot be written .No such file or directory. → name a file in a folder that exists"),
        ([str(run_of(place, "fresh", 0.003, 1, rows=0).path)], "has no rows in metrics.jsonl → plot a run that has logged a step"),
        (["nothing"], "there is no run folder nothing"),
    ):
        with pytest.raises(Mistake, match=message):
            plot.main(argv)


def test_help_teaches_and_imports_neither_torch_nor_w_b_nor_matplotlib() -> None:
    code = "import sys, json; from research.__main__ import main\ntry: main(['plot', '--help'])\n"
    code += "except SystemExit: print(json.dumps([x for x in ('torch', 'wandb', 'matplotlib') if x in sys.modules]))"
    environment = os.environ | {"COLUMNS": "80"}
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60)
    *lines, imported = said.stdout.splitlines()
    assert json.loads(imported) == [] and max(map(len, lines)) <= 80
    assert "--x {tokens,steps,seconds}" in said.stdout and "smoothed" in said.stdout
