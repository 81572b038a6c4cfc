"""The generated config.py: it evaluates to the settings that were meant, and to nothing else, whatever a stranger called his model."""

import ast
from pathlib import Path

import pytest

from research import experiment, imported
from research.config import Experiment
from tests.models.build import LLAMA_3, shape
from tests.research.example import sentence
from tests.research.runs import ROOT

MODEL = shape(position="rotary", norm="rmsnorm", mlp="swiglu", bias=False, qkv_bias=False, num_kv_heads=2, **LLAMA_3)
HOSTILE = [
    "plain",
    '"""\nimport os\nos.system("touch {mark}")\n"""',
    "'''\nimport os\nos.system('touch {mark}')\n'''",
    '", seed=__import__("os").system("touch {mark}"), x="',
    "\\",
    "\\'\"",
    "{{0.__class__}}",
    "line\nbreak\r\n\x00\x1b[31m\u2028\u202e",
    "naïve 猫 😀",
]


def made(folder: Path, config: Experiment) -> str:
    folder.mkdir()
    imported.write(folder, config, ROOT)
    return (folder / "config.py").read_text(encoding="ascii")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_stays_a_name(name, tmp_path):
    """In every place that takes text; loaded as an experiment is, from a folder of its own."""
    name = name.format(mark=tmp_path / "mark")
    config = imported.experiment(MODEL, name, f"runs/{name}", f"{name}.json", name)
    text = made(tmp_path / "mine", config)
    loaded = experiment.load(tmp_path / "mine").experiment
    assert loaded == config and loaded.init_from == f"runs/{name}" and loaded.question.startswith("What does ")
    assert not (tmp_path / "mark").exists()
    called = {node.func.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)}
    assert called <= {"Experiment", "GPT", "Data", "Schedule", "Optimizer", "Parallel", "Track"}
    kinds = {type(node) for node in ast.walk(ast.parse(text))}
    allowed = {ast.Module, ast.Expr, ast.ImportFrom, ast.alias, ast.Assign, ast.Name, ast.Store, ast.Load, ast.Call, ast.keyword}
    assert kinds <= {*allowed, ast.Constant, ast.Tuple, ast.UnaryOp, ast.USub}


def test_a_file_s_name_that_is_no_text_is_shown_without_what_is_none():
    assert imported.experiment(MODEL, "a\udcffb\x1b[31m\nc", "a", "b.json", "runs").question.startswith("What does ab[31m c know")


def test_it_reads_like_the_others(tmp_path):
    text = made(tmp_path / "mine", imported.experiment(MODEL, "model", "runs/a", "tokenizer.json", "runs"))
    assert text.startswith(
        '"""Imported weights: 2 layers of width 32, made by `python -m research import`."""\n\nfrom research.config import GPT, '
    )
    assert '    init_from="runs/a",\n    data=Data(\n' in text and '        rotary_scaling="llama3",\n' in text
    assert "track" not in text and "None" not in text.replace("parent=None", "") and max(map(len, text.splitlines())) < 140
    assert (tmp_path / "mine" / "launch.py").read_bytes() == (ROOT / "experiments/gpt_sotu/launch.py").read_bytes()


def test_a_tree_without_an_experiment_is_told(tmp_path):
    assert "has no experiment with a launch.py → put experiments/gpt_sotu back" in sentence(lambda: imported.launcher(tmp_path))
