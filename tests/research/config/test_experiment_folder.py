"""Experiment folders: config.py and variant.py are loaded by path, errors in them are reported with file and line, nothing is left behind.

A written config.py evaluates to the settings it was written from, and to nothing else, whatever names they contain.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from research import ROOT
from research.config import Experiment, experiment_folder
from research.config.experiment_folder import check_variants, load, load_variants
from research.exchange import importer
from tests.models.helpers.build import LLAMA_3, shape
from tests.research.helpers.example import example, sentence

END = "seed=1,\n)"
GOOD = (ROOT / "experiments/gpt_sotu/config.py").read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "my_idea"
    made.mkdir()
    (made / "config.py").write_text(GOOD)
    return made


def test_load(folder: Path) -> None:
    loaded = load(folder)
    assert (loaded.name, loaded.folder, loaded.variants) == ("my_idea", folder, {})
    assert loaded.experiment == load(ROOT / "experiments/gpt_sotu").experiment
    assert [path.name for path in folder.iterdir()] == ["config.py"]


def line_of(text: str, words: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), start=1) if words in line)


@pytest.mark.parametrize(
    ("edit", "at", "said"),
    [
        (("num_heads=6", "num_head=6"), "model=GPT(", "model.num_head is not a setting → did you mean model.num_heads?"),
        (("lr=3e-3", "lr=-1"), "Optimizer(", "optimizer.lr = -1 does not work → use a finite number greater than 0"),
        ((END, f"{END}\nconfig.model.num_headz = 3"), "num_headz", "model.num_headz is not a setting → did you mean model.num_heads?"),
        (("seed=1", "seed=one"), "seed=one", "NameError: name 'one' is not defined → correct the Python there"),
        (("seed=1", "seed=1 2"), "seed=1 2", "invalid syntax. Perhaps you forgot a comma? → correct the Python there"),
        ((END, f"{END}\nconfig.model.x"), "model.x", "AttributeError: 'GPT' object has no attribute 'x' → correct the Python there"),
    ],
)
def test_a_mistake_in_the_file_says_where(folder: Path, edit: tuple[str, str], at: str, said: str) -> None:
    text = GOOD.replace(*edit)
    assert text != GOOD
    (folder / "config.py").write_text(text)
    assert sentence(lambda: load("my_idea")) == f"my_idea/config.py:{line_of(text, at)}: {said}"


def test_files_that_are_not_experiments(folder: Path) -> None:
    assert "has no config.py → copy a folder that has one" in sentence(lambda: load("nowhere"))
    (folder / "config.py").write_text("x = 1")
    assert sentence(lambda: load(folder)) == "my_idea/config.py defines no `config` → write config = Experiment(…) in it"
    (folder / "config.py").write_text("config = 1")
    assert sentence(lambda: load(folder)) == "my_idea/config.py defines config = int(…) → write config = Experiment(…) in it"


VARIANT = """
from dataclasses import dataclass
from pathlib import Path

@dataclass
class MyNorm:
    size: "int"
"""


def test_variants_are_loaded_by_path_when_named(folder: Path) -> None:
    (folder / "variant.py").write_text(VARIANT)
    named = example(model={"norm": "variant:MyNorm"}).model
    assert [(name, value.__name__) for name, value in load_variants(folder, named).items()] == [("MyNorm", "MyNorm")]
    assert sorted(path.name for path in folder.iterdir()) == ["config.py", "variant.py"]


def test_a_variant_file_that_nobody_names_is_not_run(folder: Path) -> None:
    (folder / "variant.py").write_text("raise SystemError")
    assert load(folder).variants == {}


def test_loaded_experiments_bring_their_variants(folder: Path) -> None:
    (folder / "variant.py").write_text(VARIANT)
    (folder / "config.py").write_text(GOOD.replace('norm="layernorm"', 'norm="variant:MyNorm"'))
    assert list(load(folder).variants) == ["MyNorm"]


def test_variants_that_are_missing(folder: Path) -> None:
    named = example(model={"mlp": "variant:MyNrom"}).model
    no_file = "model.mlp = 'variant:MyNrom' but my_idea has no variant.py → write MyNrom in variant.py there"
    assert sentence(lambda: check_variants(folder, named)) == no_file
    assert sentence(lambda: load_variants(folder, named)) == no_file
    (folder / "variant.py").write_text(VARIANT)
    check_variants(folder, named)
    assert sentence(lambda: load_variants(folder, named)) == (
        "model.mlp = 'variant:MyNrom' but my_idea/variant.py has no MyNrom, it has MyNorm → did you mean MyNorm?"
    )
    (folder / "variant.py").write_text("import nowhere_at_all")
    assert sentence(lambda: load_variants(folder, named)).startswith("my_idea/variant.py:1: ModuleNotFoundError")


def test_loading_imports_no_torch() -> None:
    program = "import sys; from research.config.experiment_folder import load; load('experiments/gpt_sotu'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "False\n"


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
    experiment_folder.write(folder, config, ROOT)
    return (folder / "config.py").read_text(encoding="ascii")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_stays_a_name(name, tmp_path):
    """In every place that takes text; loaded as an experiment is, from a folder of its own."""
    name = name.format(mark=tmp_path / "mark")
    path = name.replace("\0", "")  # no path holds a zero byte, and a setting refuses it
    config = importer.experiment(MODEL, name, f"runs/{path}", f"{path}.json", path)
    text = made(tmp_path / "mine", config)
    loaded = experiment_folder.load(tmp_path / "mine").experiment
    assert loaded == config and loaded.init_from == f"runs/{path}" and loaded.question.startswith("What does ")
    assert not (tmp_path / "mark").exists()
    called = {node.func.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)}
    assert called <= {"Experiment", "GPT", "Data", "Schedule", "Optimizer", "Parallel", "Track"}
    kinds = {type(node) for node in ast.walk(ast.parse(text))}
    allowed = {ast.Module, ast.Expr, ast.ImportFrom, ast.alias, ast.Assign, ast.Name, ast.Store, ast.Load, ast.Call, ast.keyword}
    assert kinds <= {*allowed, ast.Constant, ast.Tuple, ast.UnaryOp, ast.USub}


def test_a_file_s_name_that_is_no_text_is_shown_with_escapes():
    question = importer.experiment(MODEL, "a\udcffb\x1b[31m\nc", "a", "b.json", "runs").question
    assert question.startswith(r"What does a\udcffb\x1b[31m c know")


def test_it_reads_like_the_others(tmp_path):
    text = made(tmp_path / "mine", importer.experiment(MODEL, "model", "runs/a", "tokenizer.json", "runs"))
    assert text.startswith(
        '"""Imported weights: 2 layers of width 32, made by `python -m research import`."""\n\nfrom research.config import GPT, '
    )
    assert '    init_from="runs/a",\n    data=Data(\n' in text and '        rotary_scaling="llama3",\n' in text
    assert "track" not in text and "None" not in text.replace("parent=None", "") and max(map(len, text.splitlines())) < 140
    assert (tmp_path / "mine" / "launch.py").read_bytes() == (ROOT / "experiments/gpt_sotu/launch.py").read_bytes()


def test_a_tree_without_an_experiment_is_told(tmp_path):
    assert "has no experiment with a launch.py → put experiments/gpt_sotu back" in sentence(lambda: experiment_folder.launcher(tmp_path))
