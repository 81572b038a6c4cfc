"""`check`: an experiment differs from its parent in what it declares and in nothing else, also over chains of forks."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from research import ROOT
from research.ablation.fork import fork
from research.ablation.lineage import Family, differences_from, folder_of, problems
from research.cli import check
from research.config.diff import PLUMBING, belongs, flatten
from research.config.experiment_folder import load
from research.config.serialization import resolved
from tests.research.helpers.example import sentence


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def said(experiments: Path, name: str) -> list[str]:
    family = Family(experiments)
    return problems(family.member(name), family)


def test_the_shipped_experiments_are_what_they_declare() -> None:
    """If this fails, `python -m research check` says what to write."""
    family = Family()
    assert [sentence for name in family.names for sentence in problems(family.member(name), family)] == []


def test_check_imports_no_torch_and_shows_a_line_for_each() -> None:
    code = "import sys; from research.cli import check; check.main([]); sys.exit('torch' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert finished.returncode == 0, finished.stdout
    assert "ok       gpt_sotu · has no parent\n" in finished.stdout
    dyt = "ok       gpt_sotu_dyt · gpt_sotu with model.norm layernorm → variant:DynamicTanh, variant.py missing → 25 lines\n"
    assert dyt in finished.stdout


POOL: dict[str, tuple[Any, ...]] = {
    "model.norm": ("layernorm", "rmsnorm"),
    "model.mlp": ("gelu", "relu", "swiglu"),
    "model.residual": ("pre_norm", "post_norm", "parallel"),
    "model.num_layers": (2, 4, 6),
    "model.tied": (True, False),
    "model.mlp_dropout": (0.0, 0.1),
    "optimizer.lr": (0.001, 0.003),
    "optimizer.betas": ((0.9, 0.95), (0.9, 0.98)),
    "schedule.steps": (270, 500),
    "seed": (1, 2, 3),
    "loss": ("cross_entropy", "variant:Focal"),
    "watch.spike": (0.0, 5.0),
    "track.group": (None, "a group"),
    "schedule.log_every": (10, 1),
}
STEP = st.dictionaries(st.sampled_from(sorted(POOL)), st.integers(0, 2), min_size=1, max_size=4)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from(["gpt_sotu", "gpt_sotu_dyt", "llama_sotu"]), chain=st.lists(STEP, min_size=1, max_size=4))
def test_what_differs_over_a_chain_of_forks_is_the_composition_of_its_changes(start: str, chain: list, experiments: Path) -> None:
    """The truth is a plain dictionary of settings, to which each fork's values are written."""
    for path in experiments.glob("fork_*"):
        shutil.rmtree(path)
    if not (experiments / "gpt_sotu" / "variant.py").exists():
        for name in ("gpt_sotu", "llama_sotu", "gpt_sotu_dyt"):
            with (experiments / name / "variant.py").open("a") as file:
                file.write("\nclass Focal:\n    pass\n")
    first = flatten(resolved(load(experiments / start).experiment))
    values, names = dict(first), [start]
    for number, step in enumerate(chain):
        chosen = {name: POOL[name][i % len(POOL[name])] for name, i in step.items()}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}
        new = {name: chosen[name] for name in chosen if plain[name] != values[name]}
        values |= {name: plain[name] for name in new}
        given = [f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}" for name, value in new.items()]
        names.append(f"fork_{number}")
        fork(experiments / names[-2], experiments / names[-1], given)
        assert set(load(experiments / names[-1]).experiment.changes) == {name for name in new if not belongs(name, PLUMBING)}
        assert said(experiments, names[-1]) == []

    family = Family(experiments)
    found = {name: (then, now) for name, then, now in differences_from(family.member(start), family.member(names[-1]))}
    science = {name for name in values if values[name] != first[name] and not belongs(name, PLUMBING)}
    assert found == {name: (first[name], values[name]) for name in science}
    declared = {name for link in names[1:] for name in load(experiments / link).experiment.changes}
    assert science <= declared


def test_a_second_change_sneaked_into_a_fork_is_flagged(experiments: Path) -> None:
    fork(experiments / "gpt_sotu", experiments / "mine", ["model.norm=rmsnorm"])
    path = experiments / "mine" / "config.py"
    edit(path, "lr=3e-3", "lr=1e-3")
    assert said(experiments, "mine") == [
        "experiments/mine differs from gpt_sotu in optimizer.lr 0.003 → 0.001, which changes does not declare → "
        'write changes=("model.norm", "optimizer.lr"), or put it back'
    ]
    edit(path, "tensor=1, pipe=1", "tensor=2, pipe=2")  # affects no result
    edit(path, "lr=1e-3", "lr=3e-3")
    assert said(experiments, "mine") == []
    edit(experiments / "gpt_sotu" / "config.py", "clip=1.0", "clip=0.5")  # in the parent
    assert "optimizer.clip 0.5 → 1.0, which changes does not declare" in said(experiments, "mine")[0]


def test_code_is_compared_if_the_settings_name_any_of_it(experiments: Path) -> None:
    fork(experiments / "gpt_sotu_dyt", experiments / "mine", ["seed=2"])
    variant = experiments / "mine" / "variant.py"
    edit(variant, "ALPHA = 0.5", "ALPHA = 0.8")
    assert said(experiments, "mine")[0].endswith('does not declare → write changes=("seed", "variant.py"), or put it back')
    variant.write_text("raise RuntimeError\n")
    assert "defines no DynamicTanh" in said(experiments, "mine")[0]
    variant.write_text("class DynamicTanh(:\n")
    assert "mine/variant.py:1: invalid syntax" in said(experiments, "mine")[0]
    fork(experiments / "gpt_sotu", experiments / "plain")
    (experiments / "plain" / "variant.py").write_text("unused = 1\n")
    assert said(experiments, "plain") == []


def test_copies_made_by_hand_are_told_what_is_missing(experiments: Path) -> None:
    shutil.copytree(experiments / "gpt_sotu", experiments / "a_copy")
    edit(experiments / "a_copy" / "config.py", 'norm="layernorm"', 'norm="rmsnorm"')
    assert said(experiments, "gpt_sotu") == []
    assert said(experiments, "a_copy") == [
        "experiments/a_copy asks what gpt_sotu asks, word for word, and has parent = None → if it is a copy, "
        'write parent="gpt_sotu", changes=("model.norm",) and a question of its own'
    ]
    edit(experiments / "a_copy" / "config.py", "parent=None", 'parent=None, init_from="runs/a/1/checkpoints/step_000000"')  # an import
    assert said(experiments, "a_copy") == []
    edit(experiments / "a_copy" / "config.py", 'parent=None, init_from="runs/a/1/checkpoints/step_000000"', "parent=None")
    edit(experiments / "a_copy" / "config.py", "parent=None", 'parent="gpt_sotu", changes=("model.norm",)')
    assert said(experiments, "a_copy") == []


PARENT = "parent=None"
WRONG = {
    "no parent of that name": (PARENT, 'parent="gpt_soto"', "parent = 'gpt_soto' is no folder in experiments → did you mean 'gpt_sotu'?"),
    "itself": (PARENT, 'parent="mine"', "parent = 'mine' is itself →"),
    "a circle": (PARENT, 'parent="child"', "its parents lead back to it, mine → child → mine →"),
    "what does not differ": (
        PARENT, 'parent="gpt_sotu", changes=("seed",)', "mine declares seed but has what gpt_sotu has there → write changes=()"
    ),
    "what affects no result": (
        PARENT, 'parent="gpt_sotu", changes=("parallel.tensor",)', "(parallel.tensor affects no result and is not declared) → write"
    ),
    "a setting that is none": (PARENT, 'parent="gpt_sotu", changes=("model.nrom",)', "declares model.nrom but has what"),
    "twice": (PARENT, 'parent="gpt_sotu", changes=("seed", "seed")', "declares a change twice: seed and seed → write changes=()"),
    "changes of nothing": (PARENT, 'parent=None, changes=("seed",)', "declares seed and has parent = None →"),
    "what does not load": ("seed=1", "seed=one", "mine/config.py:52: NameError: name 'one' is not defined"),
    "what does not divide": ("micro_batch_size=8", "micro_batch_size=5", "schedule.batch_size = 16 is not a multiple of"),
    "a missing class": ('"layernorm"', '"variant:Mine"', "model.norm = 'variant:Mine' but experiments/mine has no variant.py"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_a_sentence_and_exit_code_1(case: str, experiments: Path, capsys: pytest.CaptureFixture) -> None:
    old, new, expected = WRONG[case]
    shutil.copytree(experiments / "gpt_sotu", experiments / "mine")
    fork(experiments / "gpt_sotu", experiments / "child")
    edit(experiments / "child" / "config.py", 'parent="gpt_sotu"', 'parent="mine"')
    edit(experiments / "mine" / "config.py", "Does a small", "Does my small")
    edit(experiments / "mine" / "config.py", old, new)
    with pytest.raises(SystemExit) as ended:
        check.main(["experiments/mine", "experiments/llama_sotu"])
    output = capsys.readouterr().out
    assert ended.value.code == 1
    assert any(line.startswith("wrong    ") and expected in line for line in output.splitlines()), output
    assert "ok       llama_sotu · gpt_sotu with model.num_kv_heads 6 → 2" in output
    if case == "what does not load":
        assert "its parent mine does not load: " in said(experiments, "child")[0]


def test_a_folder_without_a_config_is_wrong_and_a_name_that_is_none_a_mistake(experiments: Path) -> None:
    (experiments / "empty").mkdir()
    assert "empty has no config.py" in said(experiments, "empty")[0]
    assert "did you mean experiments/llama_sotu?" in sentence(lambda: folder_of("lama_sotu", experiments))
    assert "there is no folder" in sentence(lambda: Family(experiments / "nowhere").names)
