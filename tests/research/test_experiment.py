"""Experiment folders: config.py and variant.py by path, what is wrong in them said with file and line, nothing left behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from research.experiment import check_variants, load, load_variants
from tests.research.example import example, sentence

ROOT = Path(__file__).resolve().parents[2]
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
    no_file = "model.mlp = 'variant:MyNrom' but my_idea has no variant.py → write class MyNrom in variant.py there"
    assert sentence(lambda: check_variants(folder, named)) == no_file
    assert sentence(lambda: load_variants(folder, named)) == no_file
    (folder / "variant.py").write_text(VARIANT)
    check_variants(folder, named)
    assert sentence(lambda: load_variants(folder, named)) == (
        "model.mlp = 'variant:MyNrom' but my_idea/variant.py has no class MyNrom, it has MyNorm → did you mean MyNorm?"
    )
    (folder / "variant.py").write_text("import nowhere_at_all")
    assert sentence(lambda: load_variants(folder, named)).startswith("my_idea/variant.py:1: ModuleNotFoundError")


def test_loading_imports_no_torch() -> None:
    program = "import sys; from research.experiment import load; load('experiments/gpt_sotu'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "False\n"
