"""`verify` passes correct layouts, and names the layout and a parameter for each of many errors, one at a time."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel.errors import Mistake
from research import ROOT
from research.cli import verify
from research.config.experiment_folder import load
from research.tracking.metrics import JsonLines
from research.verification import layouts, numbers, training
from research.verification.layouts import LayoutCase
from research.verification.numbers import TOLERANCE, row_of, worst
from tests.harness import start_server
from tests.research.helpers import mutations as m
from tests.research.helpers.example import example, sentence


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """The tests' own server, from which research.cluster.forked_ranks then forks too."""
    start_server()


DROPS = {f"{place}_dropout": 0.1 for place in ("embedding", "residual", "mlp", "attention")}
TP2, SP2 = LayoutCase(tensor=2, accumulated=2), LayoutCase(tensor=2, sequence=True, accumulated=2)
DP2, PP2 = LayoutCase(data=2, accumulated=2), LayoutCase(pipe=2, accumulated=2)


def subject(**model):
    """A shrunk experiment with a clip that binds and a smoothed loss."""
    return layouts.shrunk(example(model=model, optimizer={"clip": 0.05, "label_smoothing": 0.1, "lr": 1e-2}), 2)


REFERENCES: dict[str, training.TrainingRecord] = {}


def verdict(case, model, train=training.on_rank):
    experiment = subject(**model)
    key = json.dumps(model)
    if key not in REFERENCES:
        REFERENCES[key] = training.reference_run(experiment, 2, ROOT)
    return row_of(case, experiment, 2, ROOT, REFERENCES[key], train)


ALIBI = {"position": "alibi"}
SHARED = {"num_heads": 4, "num_kv_heads": 1, "qk_norm": True, "head_size": 24, "output_bias": False}


WRONG = [  # the error, a layout that shows it, the model, a part of the name of a parameter near the damage
    (m.no_sum_on_entry, TP2, {}, "norm"),
    (m.slices_unmarked, TP2, {}, ""),
    (m.row_bias_not_summed_over_positions, SP2, {}, ""),
    (m.means_of_means, DP2, {}, ""),
    (m.smoothing_over_own_rows, TP2, {}, ""),
    (m.dropout_by_local_position, SP2, DROPS, ""),
    (m.tied_copies_not_summed, PP2, {"tied": True}, "embedding"),
    (m.context_lost_on_the_way, PP2, DROPS, ""),
    (m.shared_head_counted_twice, TP2, SHARED, ""),
    (m.summed_again_on_exit, TP2, {}, ""),
    (m.bias_before_the_sum, TP2, {}, ""),
    (m.norms_not_summed_over_positions, SP2, {}, "norm"),
    (m.positions_of_rank_one_shifted, SP2, {}, "position"),
    (m.drawn_per_rank, TP2, {}, ""),
    (m.accumulation_forgotten, PP2, {}, ""),
    (m.everyone_reads_the_first_share, DP2, {}, ""),
    (m.padding_gets_probability, TP2, {}, ""),
    (m.dropout_by_local_feature, TP2, DROPS, ""),
    (m.slopes_of_the_first_heads, TP2, ALIBI, "attention"),
    (m.shared_head_of_own_queries, TP2, SHARED, ""),
]
FAST_WRONG = (
    *("no_sum_on_entry", "slices_unmarked", "row_bias_not_summed_over_positions", "means_of_means", "smoothing_over_own_rows"),
    *("dropout_by_local_position", "tied_copies_not_summed", "context_lost_on_the_way", "shared_head_counted_twice"),
)
"""At least one error along every axis and in every quantity that is compared. The others are slow."""


@pytest.mark.parametrize(
    ("mutation", "case", "model", "near"),
    [pytest.param(*row, id=row[0].__name__, marks=[] if row[0].__name__ in FAST_WRONG else pytest.mark.slow) for row in WRONG],
)
def test_what_is_wrong_is_found_and_named(mutation, case, model, near):
    row = verdict(case, model, m.mutated(mutation))
    assert row.verdict == "FAILED"
    assert not row.why, row.why
    assert max(row.loss, row.norm, row.gradient, row.weight) > 10 * TOLERANCE
    assert near in row.gradient_at or near in row.weight_at, (row.gradient_at, row.weight_at)


CASES = {"TP2": TP2, "SP2": SP2, "DP2": DP2, "PP2": PP2}
MODELS = {"plain": {}, "dropout": DROPS, "alibi": ALIBI, "shared kv head": SHARED}
FAST_RIGHT = {("TP2", "shared kv head"), ("SP2", "dropout"), ("SP2", "alibi"), ("DP2", "plain"), ("PP2", "dropout")}
"""Every layout once, every model once. The others are slow."""


@pytest.mark.parametrize(
    ("case", "model"),
    [
        pytest.param(case, model, id=f"{name}-{what}", marks=[] if (name, what) in FAST_RIGHT else pytest.mark.slow)
        for what, model in MODELS.items()
        for name, case in CASES.items()
    ],
)
def test_what_is_right_passes(case, model):
    row = verdict(case, model)
    assert row.verdict == "pass", row
    assert 0 < max(row.gradient, row.weight) <= TOLERANCE


def test_a_rank_that_raises_is_shown(tmp_path):
    row = verdict(TP2, {}, m.functools.partial(m.train_mutated, "there_is_no_such_mutation"))
    assert row.verdict == "FAILED"
    assert "rank 0" in row.why
    assert "KeyError" in row.why


def test_every_way_of_running_stands_beside_every_axis():
    for world in (2, 4, 8):
        found = layouts.pairwise(world)
        assert {case.world for case in found} == {world}
        assert {(case.pipe, case.data, case.tensor) for case in found} == set(layouts.grids(world))
        for axis in ("pipe", "data", "tensor"):
            along = [case for case in found if getattr(case, axis) > 1]
            assert {case.recompute for case in along} == set(layouts.RECOMPUTES)
            assert {case.accumulated for case in along} == set(layouts.ACCUMULATIONS)
            assert {case.zero_stage for case in along} >= ({1} if axis == "pipe" else {1, 2, 3})
        assert any(case.sequence for case in found if case.tensor > 1)
        assert all(layouts.why_not(case, layouts.shrunk(example(), world)) is None for case in found)


def test_a_layout_that_cannot_be_has_a_reason():
    assert "pipeline" in layouts.why_not(LayoutCase(pipe=2, zero_stage=2), subject())
    odd = subject().model_copy(update={"model": subject().model.model_copy(update={"num_heads": 3, "num_kv_heads": 3})})
    assert "num_heads = 3" in layouts.why_not(TP2, odd)


def test_shrinking_keeps_the_structure():
    shrunk = layouts.shrunk(example(model={"num_heads": 6, "num_kv_heads": 2, "mlp": "swiglu"}), 4).model
    assert shrunk.num_kv_heads < shrunk.num_heads
    assert (shrunk.num_heads % shrunk.num_kv_heads, shrunk.mlp, shrunk.num_heads % 4, shrunk.vocab_size % 2) == (0, "swiglu", 0, 1)


def test_a_missing_or_infinite_parameter_is_infinitely_wrong():
    truth = {"a": torch.ones(2), "b": torch.ones(2)}
    assert worst([{"a": torch.ones(2)}], truth) == (torch.inf, "b")
    assert worst([{"a": torch.ones(2), "b": torch.full((2,), torch.nan)}], truth) == (torch.inf, "b")
    assert worst([truth, {"b": torch.tensor([1.0, 1.5])}], truth)[1] == "b"


def test_a_negligible_gradient_is_measured_against_the_whole():
    truth = {"big": torch.full((4,), 100.0), "zero": torch.tensor([1e-9])}
    assert worst([{"big": truth["big"], "zero": torch.tensor([3e-9])}], truth)[0] < 1e-10


def test_two_checks_at_once_are_refused():
    folder = str(ROOT / "experiments/gpt_sotu")
    assert "run one at a time" in sentence(lambda: verify.main([folder, "--ledger", "--types"]))


def runs_with(tmp_path, *losses):
    folders = []
    for i, values in enumerate(losses):
        folder = tmp_path / "x" / f"run{i}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")
        rows = JsonLines(folder / "metrics.jsonl")
        for step, loss in values.items():
            rows.write({"progress/step": step, "train/loss": loss})
        rows.close()
        folders.append(str(folder))
    return folders


def test_two_runs_are_compared_row_by_row(tmp_path, capsys):
    a, b, c, none = runs_with(tmp_path, {1: 2.0, 2: 1.0}, {1: 2.0, 2: 1.00001}, {1: 2.0, 2: 1.1}, {7: 1.0})
    assert verify.compare_runs(a, b) == 0
    assert "1.0e-05 at step 2, 2 rows" in capsys.readouterr().out
    assert verify.compare_runs(a, c) == 1
    with pytest.raises(Mistake, match="no row in common"):
        verify.compare_runs(a, none)


def copied(name: str, place: Path) -> Path:
    """A copy of an experiment of ours whose runs lie in `place`/runs."""
    folder = place / name
    shutil.copytree(ROOT / "experiments" / name, folder)
    text = (folder / "config.py").read_text()
    track = 'track=Track(project="tessera")'
    assert text.count(track) == 1
    (folder / "config.py").write_text(text.replace(track, f'track=Track(project="tessera", runs="{place / "runs"}")'))
    return folder


def test_the_command_prints_a_row_per_layout_and_writes_verify_json(tmp_path, capsys, monkeypatch):
    """Two layouts of an experiment with a class of its own."""
    monkeypatch.setattr(numbers, "pairwise", lambda world: [SP2, PP2])
    with pytest.raises(SystemExit) as left:
        verify.main([str(copied("gpt_sotu_dyt", tmp_path)), "--ranks", "2", "--steps", "1"])
    assert left.value.code == 0
    assert capsys.readouterr().out.count("\npass ") == 2
    written = json.loads((tmp_path / "runs/gpt_sotu_dyt/verify.json").read_text())
    assert [row["verdict"] for row in written["rows"]] == ["pass"] * 2
    assert list(written["rows"][0]) == [
        "cut", "verdict", "loss", "norm", "gradient", "gradient_at", "weight", "weight_at", "seconds", "why"
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(tmp_path):
    """All pairwise layouts of two ranks, as a person runs it."""
    done = subprocess.run(
        [sys.executable, "-m", "research", "verify", str(copied("gpt_sotu_dyt", tmp_path)), "--ranks", "2", "--steps", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\npass ") == 9
    written = json.loads((tmp_path / "runs/gpt_sotu_dyt/verify.json").read_text())
    assert [row["verdict"] for row in written["rows"]] == ["pass"] * 9


EVERYTHING = {  # what is replaced in the config.py of experiments/gpt_sotu
    "embedding_dropout=0.0": "embedding_dropout=0.1",
    "residual_dropout=0.0": "residual_dropout=0.1",
    "mlp_dropout=0.0": "mlp_dropout=0.1",
    "attention_dropout=0.0": "attention_dropout=0.1",
    "vocab_size=8192": "vocab_size=8193",
    "parallel=Parallel(tensor=1, pipe=1, zero_stage=1)": 'parallel=Parallel(tensor=2, pipe=1, sequence=True, recompute="selective")',
}


def everything_at_once(place: Path) -> Path:
    """An experiment's folder outside the repository: dropout everywhere, sequence parallelism, selective recomputation, a tied head."""
    folder = copied("gpt_sotu", place).rename(place / "everything_at_once")
    text = (folder / "config.py").read_text()
    for old, new in EVERYTHING.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "config.py").write_text(text)
    return folder


def test_everything_at_once_is_kept_when_shrunk(tmp_path):
    written = load(everything_at_once(tmp_path)).experiment
    shrunk = layouts.shrunk(written, 4)
    for model in (written.model, shrunk.model):
        assert model.tied and {getattr(model, place) for place in DROPS} == {0.1}
        assert model.vocab_size % 2 == 1
    assert (written.parallel.sequence, written.parallel.recompute) == (True, "selective")
    together = {case.tensor for world in (2, 4) for case in layouts.pairwise(world) if case.sequence and case.recompute == "selective"}
    assert together == {2, 4}


@pytest.mark.slow
def test_dropout_sequence_recomputation_tied_head_and_odd_vocabulary_pass_together(tmp_path):
    """The real command on four ranks; every layout's worst gradient and weight is within 1e-5."""
    folder = everything_at_once(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "research", "verify", str(folder), "--ranks", "4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "runs/everything_at_once/verify.json").read_text())["rows"]
    assert len(rows) >= sum(len(layouts.pairwise(world)) for world in (2, 4)) == 27
    for row in rows:
        assert row["verdict"] == "pass"
        assert 0 < row["gradient"] <= 1e-5 and 0 < row["weight"] <= 1e-5 and row["loss"] <= 1e-5, row
    together = [row["cut"] for row in rows if row["cut"]["sequence"] and row["cut"]["recompute"] == "selective"]
    assert {(case["pipe"], case["data"], case["tensor"]) for case in together} == {(1, 1, 2), (1, 1, 4), (1, 2, 2), (2, 1, 2)}
