"""results/ of a fork: what `ablate` keeps there, when it is out of date, and what `check`, `tree` and `fork` make of it."""

import json
from pathlib import Path

import pytest

from research.ablation import forest, results
from research.ablation.comparison import Question, compare
from research.ablation.fork import fork
from research.ablation.lineage import Family
from research.ablation.sides import find_sides
from research.cli import ablate, check
from research.cli import tree as verb
from research.config.experiment_folder import RESULTS, load
from tests.research.ablation.helpers.finished_runs import write_run
from tests.research.ablation.test_lineage import edit
from tests.research.helpers.example import sentence


@pytest.fixture
def family(experiments: Path) -> Family:
    """gpt_sotu and a fork, compared over two seeds, with the result in the fork's folder."""
    fork(experiments / "gpt_sotu", experiments / "mine", ["optimizer.lr=1e-3"])
    for name, losses in (("gpt_sotu", (3.0, 3.1)), ("mine", (2.9, 3.01))):
        experiment = load(experiments / name).experiment
        for seed, loss in enumerate(losses, 1):
            write_run(experiments.parent / "runs", name, seed, [loss], experiment=experiment.model_copy(update={"seed": seed}))
    family = Family(experiments)
    comparison = compare(find_sides(["gpt_sotu", "mine"], experiments.parent / "runs"), Question())
    results.save(experiments / "mine" / RESULTS, family.member("gpt_sotu"), family.member("mine"), comparison, ("--schedule.steps", "100"))
    return family


def said(experiments: Path) -> list[str]:
    family = Family(experiments)
    return results.problems(family.member("mine"), family)


def test_the_result_is_read_back_and_shown(family: Family, experiments: Path) -> None:
    result = results.read(family.member("gpt_sotu"), family.member("mine"))
    assert result is not None and (result.seeds, result.outdated, result.metric) == (2, "", "val/bits_per_byte")
    table = json.loads((experiments / "mine" / RESULTS / "ablation.json").read_text())
    assert result.difference == f"{table['difference']:+.4f} ({table['low']:+.4f} to {table['high']:+.4f})" and table["difference"] < 0
    assert result.description.endswith(" val/bits_per_byte, 2 seeds, with --schedule.steps 100")
    trees = forest.forest(family, root=experiments.parent)
    assert any("2 seeds, with --schedule.steps 100" in line for line in verb.lines(trees, 200))
    assert "--schedule.steps 100](mine/results/compare.md)\n" in forest.markdown(trees)
    assert said(experiments) == []


def test_one_seed_has_no_interval(family: Family, experiments: Path) -> None:
    comparison = compare(find_sides(["gpt_sotu:seed=1", "mine:seed=1"]), Question())
    results.save(experiments / "mine" / RESULTS, family.member("gpt_sotu"), family.member("mine"), comparison, ())
    result = results.read(family.member("gpt_sotu"), family.member("mine"))
    assert result is not None and result.description.startswith("not distinguishable: -0.0") and "(" not in result.description


@pytest.mark.parametrize(
    ("name", "old", "new", "what"),
    [
        ("mine", "lr=0.001", "lr=0.002", "mine: optimizer.lr 0.001 → 0.002"),
        ("gpt_sotu", "clip=1.0", "clip=0.5", "gpt_sotu: optimizer.clip 1.0 → 0.5"),
    ],
)
def test_results_of_other_settings_are_out_of_date(family: Family, experiments: Path, name: str, old: str, new: str, what: str) -> None:
    edit(experiments / name / "config.py", old, new)
    (problem,) = said(experiments)
    assert problem == f"experiments/mine/results is of other settings ({what}) → python -m research ablate mine, or remove the folder"
    edit(experiments / name / "config.py", new, old)
    edit(experiments / "mine" / "config.py", "tensor=1", "tensor=2")  # affects no result
    assert said(experiments) == []
    (experiments / "mine" / "variant.py").write_text("")  # no setting names anything in it
    assert said(experiments) == []


def test_results_of_other_code_are_out_of_date(experiments: Path) -> None:
    member = Family(experiments).member("gpt_sotu_dyt")
    then = results._as_json(member)
    assert results._outdated(Path(), then, member) == ""
    edit(experiments / "gpt_sotu_dyt" / "variant.py", "ALPHA = 0.5", "ALPHA = 0.8")
    assert results._outdated(Path(), then, member) == "gpt_sotu_dyt: variant.py has changed"


def test_check_reports_them_and_damage(family: Family, experiments: Path, capsys: pytest.CaptureFixture) -> None:
    edit(experiments / "mine" / "config.py", "lr=0.001", "lr=0.002")
    with pytest.raises(SystemExit, match="1"):
        check.main(["mine", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown == [{"experiment": "experiments/mine", "problems": said(experiments)}] and len(said(experiments)) == 1
    for text, words in (
        ("{", "is not JSON"),
        ("{}", "is not what ablate writes (KeyError: 'difference')"),
        ('{"difference": []}', "KeyError"),
    ):
        (experiments / "mine" / RESULTS / "ablation.json").write_text(text)
        assert words in said(experiments)[0] and "ablate mine" in said(experiments)[0]


def test_results_written_by_an_older_schema_are_migrated(family: Family, experiments: Path) -> None:
    """A new setting must not make every committed result look out of date."""
    path = experiments / "mine" / RESULTS / "ablation.json"
    table = json.loads(path.read_text())
    for side in ("parent", "fork"):
        table[side]["config"]["schema"] = 9
        del table[side]["config"]["changes"], table[side]["config"]["schedule"]["length_ramp"]
    path.write_text(json.dumps(table))
    assert said(experiments) == []


def test_a_fork_has_no_results_of_its_parent(family: Family, experiments: Path) -> None:
    fork(experiments / "mine", experiments / "second", ["seed=7"])
    assert (experiments / "mine" / RESULTS).is_dir() and not (experiments / "second" / RESULTS).exists()


def test_what_cannot_be_ablated(experiments: Path) -> None:
    fork(experiments / "gpt_sotu", experiments / "mine", ["optimizer.lr=1e-3"])
    assert "gpt_sotu has no parent with which it could be compared" in sentence(lambda: ablate.main(["gpt_sotu"]))
    assert "did you mean experiments/mine?" in sentence(lambda: ablate.main(["mime"]))
    assert "--out x is one folder, and there are 2 forks" in sentence(lambda: ablate.main(["mine", "gpt_sotu_dyt", "--out", "x"]))
    assert "--seeds '0x'" in sentence(lambda: ablate.main(["mine", "--seeds", "0x"]))
    edit(experiments / "mine" / "config.py", "clip=1.0", "clip=0.5")
    assert "optimizer.clip 1.0 → 0.5, which changes does not declare" in sentence(lambda: ablate.main(["mine"]))


def test_the_shipped_results_are_of_the_settings_that_their_experiments_have() -> None:
    """If this fails: python -m research ablate."""
    family = Family()
    assert [problem for name in family.names for problem in results.problems(family.member(name), family)] == []
