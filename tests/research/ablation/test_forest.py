"""`tree`: parents stand above their forks, results are those of runs with its settings, experiments/README.md is current."""

import subprocess
from pathlib import Path

import pytest
from rich.cells import cell_len

from research import ROOT
from research.ablation import forest, lineage
from research.ablation.fork import fork
from research.ablation.lineage import Family
from research.cli import tree as verb
from research.tracking.metrics import JsonLines
from tests.research.ablation.test_difference import run_of
from tests.research.ablation.test_lineage import edit
from tests.research.helpers.example import sentence


def test_the_committed_page_has_the_lineage_of_the_shipped_experiments() -> None:
    """If this fails: python -m research tree --markdown."""
    listed = subprocess.run(["git", "ls-files", "experiments/*/config.py"], cwd=ROOT, capture_output=True, text=True)
    family = Family()
    names = sorted(Path(line).parent.name for line in listed.stdout.splitlines()) or family.names
    written = (ROOT / "experiments" / "README.md").read_text("utf-8").partition(forest.BEST)[0]
    assert written == forest.markdown(forest.forest(family, names, with_results=False))


def test_forks_stand_below_their_parents(experiments: Path) -> None:
    fork(experiments / "gpt_sotu_dyt", experiments / "b_fork", ["seed=2"])
    fork(experiments / "b_fork", experiments / "a_fork", ["parallel.tensor=2"])
    edit(experiments / "llama_sotu" / "config.py", 'parent="gpt_sotu"', 'parent="gone"')
    trees = forest.forest(Family(experiments), root=experiments.parent)
    assert [(depth, tree.member.name) for depth, tree in forest.walk(trees)] == [
        (0, "gpt_sotu"), (1, "gpt_sotu_3d"), (1, "gpt_sotu_dyt"), (2, "b_fork"), (3, "a_fork"), (0, "llama_sotu")
    ]  # fmt: skip
    lines = verb.lines(trees, 60)
    first = lines.index("└─ gpt_sotu_dyt")
    assert lines[first:] == [
        "└─ gpt_sotu_dyt",
        "   │  model.norm layernorm → variant:DynamicTanh, variant.py",
        "   │    missing → 25 lines",
        "   └─ b_fork",
        "      │  seed 1 → 2",
        "      └─ a_fork",
        "            nothing that affects results",
        "llama_sotu",
        "   Are Llama's choices (RMSNorm, rotary, SwiGLU, grouped",
        "     queries, no biases) better than GPT-2's at this size?",
        "     (its parent gone is not here)",
    ]
    assert max(map(cell_len, lines)) <= 60


def test_parents_in_a_circle_and_folders_that_do_not_load_are_shown_once(experiments: Path) -> None:
    edit(experiments / "gpt_sotu" / "config.py", "parent=None", 'parent="llama_sotu"')
    edit(experiments / "gpt_sotu_3d" / "config.py", "seed=1", "seed=one")
    trees = forest.forest(Family(experiments), root=experiments.parent)
    assert sorted(tree.member.name for _, tree in forest.walk(trees)) == ["gpt_sotu", "gpt_sotu_3d", "gpt_sotu_dyt", "llama_sotu"]
    assert any("does not load: " in line for line in verb.lines(trees, 80))
    assert "name 'one' is not defined" in sentence(lambda: forest.refuse_unloadable(trees))


def test_the_best_result_is_that_of_runs_with_the_experiment_s_settings(experiments: Path) -> None:
    def run(bits: list[float], **settings) -> str:
        folder = run_of(experiments.parent, "gpt_sotu", **settings)
        file = JsonLines(folder.metrics)
        for step, value in enumerate(bits, 1):
            file.write({"progress/step": 10 * step, "train/loss": 1.0, "val/bits_per_byte": value})
        file.close()
        return folder.id

    def result() -> forest.Result | None:
        return forest.result_of(Family(experiments).member("gpt_sotu"), experiments.parent)

    assert result() is None
    run([0.1], optimizer__lr=0.5)
    assert result() == forest.Result(None, 0, "", 0, 1) and forest.describe(result()) == "no run has these settings · 1 run with others"  # type: ignore[arg-type]
    best = run([2.5, 2.25, float("nan"), 2.375], seed=3, parallel__tensor=2)
    run([2.5, 2.4])
    run([])
    run_of(experiments.parent, "gpt_sotu").config.write_text("{")
    assert result() == forest.Result(2.25, 20, best, 2, 1)
    trees = forest.forest(Family(experiments), root=experiments.parent)
    assert f"│  best 2.250 bits/byte at step 20 of {best} · 2 runs, and 1 with other settings" in verb.lines(trees, 80)
    head, _, results = forest.markdown(trees).partition(forest.BEST)
    assert "| gpt_sotu | 2.250 | 20 | 2 |\n" in results
    assert head == forest.markdown(forest.forest(Family(experiments), with_results=False))


def test_the_page_is_written_whole(experiments: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(lineage.Family.__init__, "__defaults__", (experiments,))
    edit(experiments / "gpt_sotu" / "config.py", "Does a small", "Does <b> a *small* [one]")
    verb.main(["--markdown"])
    assert capsys.readouterr().out == "written  experiments/README.md\n"
    text = (experiments / "README.md").read_text("utf-8")
    assert "- [gpt_sotu](gpt_sotu/) · Does \\<b\\> a \\*small\\* \\[one\\] GPT" in text
    assert "  - [gpt_sotu_dyt](gpt_sotu_dyt/) · `model.norm` layernorm → variant:DynamicTanh, `variant.py` · Can a" in text
    verb.main([])
    assert "├─ gpt_sotu_3d\n" in capsys.readouterr().out
