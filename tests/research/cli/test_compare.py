"""`python -m research compare`: what it prints and writes, its mistakes, and real runs from end to end."""

import csv
import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from parallel.errors import Mistake
from research import ROOT
from research.cli import compare
from research.config import serialization
from research.tracking import plot, run_folder
from research.tracking.run_folder import RunFolder
from tests.research.ablation.helpers.finished_runs import write_run
from tests.research.helpers.small_runs import Stage
from tests.research.tracking.test_tracker import inspected, of

FILES = {
    *("compare.md", "differences.csv", "runs.csv"),
    *(f"{name}_{theme}.{kind}" for name in ("curves", "differences") for theme in ("light", "dark") for kind in ("png", "svg")),
}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    runs = Path("runs")
    for seed, (a, b) in enumerate(((3.0, 2.9), (3.1, 3.01), (3.05, 2.94)), start=1):
        write_run(runs, "gpt", seed, [4.0, a])
        write_run(runs, "gpt_rmsnorm", seed, [4.0, b], model={"norm": "rmsnorm"})
        write_run(runs, "a|long_name_of_an_experiment_that_wraps", seed, [4.0, a + 0.01 * (seed - 2)], optimizer={"lr": 1e-3})
    return runs


def evaluated(run: RunFolder, value: float, step: int = 200, **changes: str) -> None:
    """The results file that `evaluate RUN --tasks python_bodies` writes."""
    facts = {"examples": 283, "seconds": 1.0, "tensor": 1, "batch": 8, "ended": "", "files": {}, "precision": "fp32"}
    key = {"task": "python_bodies", "settings": {}, "data_sha256": "a", "code_sha256": "c", "model_sha256": "", "tokenizer_sha256": ""}
    metrics = {"exact_lines": {"value": value, "stderr": 0.01, "higher_is_better": True}}
    folder = run.path / "evaluations"
    folder.mkdir(exist_ok=True)
    (folder / f"step_{step:06d}.json").write_text(json.dumps({"schema": 2, "results": [facts | key | changes | {"metrics": metrics}]}))


def test_metrics_of_evaluations(runs: Path, capsys: pytest.CaptureFixture) -> None:
    """Of the checkpoint after the last step; other examples, other code and runs without an evaluation are refused with what to do."""
    command = ["gpt", "gpt_rmsnorm", "--metric", "eval/python_bodies/exact_lines"]
    with pytest.raises(Mistake, match="has no row with eval/python_bodies/exact_lines"):
        compare.main(command)
    for name, higher in (("gpt", 0.0), ("gpt_rmsnorm", 0.1)):
        for run in run_folder.of_experiment(runs / name):
            seed = serialization.load(run.config).seed
            evaluated(run, 0.5, step=100)
            evaluated(run, 0.2 + 0.01 * seed + higher * (0.99 + 0.01 * seed))
    compare.main(command)
    said = capsys.readouterr().out
    assert "gpt_rmsnorm is better than gpt: +0.10100 in eval/python_bodies/exact_lines" in said and "final value at 410 k tokens" in said
    last = run_folder.of_experiment(runs / "gpt_rmsnorm")[-1]
    for change, called in (("data_sha256", "examples"), ("code_sha256", "code of the evaluation")):
        evaluated(last, 0.3, **{change: "b"})
        with pytest.raises(Mistake, match=f"was computed with different {called} → evaluate both again: python -m research evaluate RUN"):
            compare.main(command)
    (last.path / "evaluations" / "step_000200.json").unlink()
    with pytest.raises(Mistake, match=f"{last.title} was not evaluated on python_bodies → python -m research evaluate {last.title}"):
        compare.main(command)


SIDES = ["gpt", "gpt_rmsnorm", "a|long_name_of_an_experiment_that_wraps"]


def test_a_table_of_80_columns_verdicts_and_every_file(runs: Path, capsys: pytest.CaptureFixture) -> None:
    compare.main([*SIDES, "--smallest", "0.01"])
    said = capsys.readouterr().out
    lines = said.splitlines()
    head = next(i for i, line in enumerate(lines) if "95 % interval" in line)
    assert all(len(line) <= 80 for line in lines[head : lines.index("", head)])
    assert lines[0] == "compare  val/bits_per_byte, lower is better · final value at 410 k tokens"
    assert "differs  gpt_rmsnorm: model.norm layernorm → rmsnorm" in lines
    assert "warn     gpt_rmsnorm has 3,375,552 parameters, gpt 3,377,280 (-0.05 %)" in lines
    verdicts = [line for line in lines if line.startswith("verdict")]
    # by hand: differences of −0.10, −0.09 and −0.11 nats, 0.3206 bits per byte each: t = −0.1 / (0.01 / √3) = −17.3, twice p = 0.0033
    numbers = "-0.0321 in val/bits_per_byte, 95 % interval -0.0400 to -0.0241, p = 0.0066 by Holm over 2 variants, 3 seeds"
    assert verdicts[0] == f"verdict  gpt_rmsnorm is better than gpt: {numbers}"
    assert re.search(
        r"is not distinguishable from gpt at this budget \(about \d+ more seeds? would tell an effect of 0\.01\): ", verdicts[1]
    )
    assert {path.name for path in Path("compare").iterdir()} == FILES
    for path in Path("compare").glob("*.svg"):
        ElementTree.parse(path)
    # the same runs again: the same bytes, and the report begins with what differs
    compare.main([*SIDES, "--smallest", "0.01", "--json", "--out", "there"])
    assert {path.name: path.read_bytes() for path in Path("there").iterdir()} == {
        path.name: path.read_bytes() for path in Path("compare").iterdir()
    }
    shown = json.loads(capsys.readouterr().out)
    text = Path("there/compare.md").read_text()
    assert text.index("| model.norm | layernorm | rmsnorm |") < text.index("## Verdict") < text.index("## Method")
    assert 'srcset="curves_dark.svg"' in text and "| a\\|long_name_of_an_experiment_that_wraps | 3 |" in text
    rows = list(csv.DictReader(io.StringIO(Path("there/differences.csv").read_text())))
    assert [float(row["difference"]) for row in rows] == [variant["difference"] for variant in shown["variants"]]
    assert [row["verdict"] for row in rows] == ["better", "not distinguishable"]
    assert shown["variants"][0]["changes"] == [{"setting": "model.norm", "baseline": "layernorm", "variant": "rmsnorm"}]
    values = {(row["side"], row["seed"]): float(row["final"]) for row in csv.DictReader(io.StringIO(Path("there/runs.csv").read_text()))}
    assert values["gpt", "2"] - values["gpt", "1"] == pytest.approx(shown["runs"][1]["final"] - shown["runs"][0]["final"])
    assert len(values) == 9


def test_one_pair_has_no_interval(runs: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "save", lambda figure, picture: picture.touch())  # drawn, but not rendered: that takes a second
    write_run(runs, "one", 1, [4.0, 2.0])
    compare.main(["gpt", "one", "--at", "seconds", "--value", "best", "--iso", "params"])
    said = capsys.readouterr().out
    assert "iso      one has 3,377,280 parameters, +0.00 % beside the 3,377,280 of gpt: no other model.ffn_size is needed" in said
    assert "one is not distinguishable from gpt: " in said and "one pair of runs says nothing of the noise between seeds" in said
    assert "inf" not in said and "nan" not in said
    assert "inf" not in Path("compare/compare.md").read_text()


def test_mistakes_are_sentences(runs: Path) -> None:
    Path("taken").write_text("")
    source = write_run(runs, "dyt", 1, [4.0, 2.0], model={"norm": "variant:DyT"}).source
    source.mkdir()
    (source / "variant.py").write_text("class DyT: ...\n")
    for argv, message in (
        (["gpt"], "compare needs two sides or more → "),
        (["gpt", "dyt", "--at", "flops"], "--at flops: no formula counts the FLOPs of dyt-.*, which has a class of variant.py or a "),
        (
            ["gpt", "dyt", "--iso", "flops"],
            "--iso flops: no model.ffn_size gives dyt as many FLOPs per token as gpt, or a class",
        ),
        (["gpt", "gpt_rmsnorm", "--metric", "train/loss", "--windows"], "--windows is about the held-out text, and train/loss is not → "),
        (["gpt", "gpt_rmsnorm", "--value", "best", "--windows"], "--windows scores the checkpoints of the ends of the runs, and other"),
        (["gpt", "gpt_rmsnorm", "--smallest", "0"], "argument --smallest: '0' is not a number above 0"),
        (["gpt", "gpt_rmsnorm", "--smallest", "x"], "argument --smallest: "),
        (["gpt", "gpt_rmsnorm", "--out", "taken"], "taken cannot be written .File exists. → "),
        (["gpt", "gpt_rmsnorm", "--metrik", "x"], "does not know --metrik → did you mean --metric?"),
        (["gpt", "nothing"], "there is no run folder nothing"),
    ):
        with pytest.raises(Mistake, match=message):
            compare.main(argv)
    assert not Path("compare").exists()


def test_neither_torch_nor_w_b_nor_matplotlib_is_imported_for_a_mistake() -> None:
    code = "import sys; from research.__main__ import main; main(['compare', 'nothing', 'here']); "
    code += "print([name for name in ('torch', 'wandb', 'matplotlib') if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout == "[]\n" and "there is no run folder nothing" in said.stderr


@pytest.mark.slow
def test_a_w_b_run_of_the_job_type_compare(runs: Path, capsys: pytest.CaptureFixture) -> None:
    compare.main([*SIDES, "--wandb", "offline"])
    assert "tracking W&B offline (as asked) · later: wandb sync compare/wandb\n" in capsys.readouterr().out
    records = inspected(RunFolder(Path("compare")))
    (run,) = of(records, "run")
    assert (run["job_type"], run["project"], run["run_group"]) == ("compare", "tessera", "compare")
    (row,) = of(records, "history")
    (offline,) = Path("compare/wandb").glob("offline-run-*")
    table = json.loads((offline / "files" / row["item"]["differences.path"]).read_text())
    assert [dict(zip(table["columns"], one, strict=True))["verdict"] for one in table["data"]] == ["better", "not distinguishable"]
    assert {"curves_picture.path", "differences_picture.path"} <= {*row["item"]}


@pytest.mark.slow
def test_real_runs_from_training_to_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Three seeds at two learning rates, one of them far too low, and one run with another tokenizer."""
    stage = Stage(tmp_path)
    monkeypatch.chdir(tmp_path)
    schedule = {"steps": 12, "validate_every": 4}
    for seed in (1, 2, 3):
        for name, lr in (("base", 3e-3), ("low", 3e-5)):
            ended = stage.run(name, seed=seed, schedule=schedule, optimizer={"lr": lr, "min_lr": 0.0})
            assert ended.codes == [0], ended.said
    compare.main(["base/gpt_sotu", "low/gpt_sotu", "--json"])
    (variant,) = json.loads(capsys.readouterr().out)["variants"]
    assert variant["verdict"] == "worse" and variant["pairs"] == 3
    assert [change["setting"] for change in variant["changes"]] == ["optimizer.lr"]

    compare.main(["base/gpt_sotu", "low/gpt_sotu", "--metric", "val/loss", "--windows", "--json"])
    shown = json.loads(capsys.readouterr().out)
    (variant,) = shown["variants"]
    assert "more than the noise of the held-out text" in variant["sentence"]
    found = tmp_path.glob("*/gpt_sotu/[0-9a-f]*/evaluations/windows/step_000012.json")  # not through the link `latest`
    kept = {path: json.loads(path.read_text()) for path in found}
    finals = {row["run"].rpartition("-")[2]: row["final"] for row in shown["runs"]}
    assert len(kept) == len(finals) == 6
    for path, scores in kept.items():  # the windows together are the validation
        assert sum(scores["nats"]) / sum(scores["tokens"]) == pytest.approx(finals[path.parts[-4]], rel=1e-5)
    nats = {name: np.mean([scores["nats"] for path, scores in kept.items() if name in path.parts], axis=0) for name in ("base", "low")}
    tokens, difference = np.array(scores["tokens"]), nats["low"] - nats["base"]
    resampled = np.random.default_rng(0).integers(0, len(tokens), (2000, len(tokens)))
    spread = np.std(difference[resampled].sum(1) / tokens[resampled].sum(1))  # a bootstrap over windows
    assert variant["text_stderr"] == pytest.approx(spread, rel=0.1)
    before = {path: path.stat().st_mtime_ns for path in kept}
    compare.main(["base/gpt_sotu", "low/gpt_sotu", "--windows"])
    assert {path: path.stat().st_mtime_ns for path in kept} == before  # nothing is scored twice

    other_data = {"tokenizer": "builtin:bytes"}
    assert stage.run("bytes", seed=1, schedule=schedule, data=other_data, model={"vocab_size": 257}).codes == [0]
    with pytest.raises(Mistake, match="val/loss is per token: .*the tokenizer builtin:bytes → compare --metric val/bits_per_byte"):
        compare.main(["base/gpt_sotu", "bytes/gpt_sotu", "--metric", "val/loss"])
    compare.main(["base/gpt_sotu", "bytes/gpt_sotu"])  # the held-out text has as many bytes in either
    with pytest.raises(Mistake, match="windows that are not the same"):
        compare.main(["base/gpt_sotu", "bytes/gpt_sotu", "--windows"])
