"""`verify` passes correct layouts, and names the layout and a parameter for each of many errors, one at a time."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel.engines.deepspeed_config import derive
from parallel.errors import Mistake
from research import ROOT
from research.cli import verify
from research.config.experiment_folder import load
from research.config.layout import engine_settings, layout
from research.tracking.metrics import JsonLines
from research.training.schedule import learning_rate
from research.verification import layouts, numbers, training
from research.verification.layouts import LayoutCase
from research.verification.numbers import TOLERANCE, errors_of, row_of, whole_outputs, worst
from research.verification.training import TrainingRecord, one_thread
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


STEPS = 2


def subject(**model):
    """The example as `verify` shrinks it. `examples` is the setting of the data, and all others are of the model."""
    examples = model.pop("examples", "stream")
    whole = example(model=model)
    return layouts.shrunk(whole.model_copy(update={"data": whole.data.model_copy(update={"examples": examples})}), 2, STEPS)


@functools.cache
def subject_and_reference(model: str):
    """The shrunk example with a clip that binds, and its serial reference run."""
    with one_thread():
        experiment = training.binding_clip(subject(**json.loads(model)), STEPS, ROOT)
        return experiment, training.reference_run(experiment, STEPS, ROOT)


def verdict(case, model, train=training.on_rank):
    experiment, reference = subject_and_reference(json.dumps(model))
    return row_of(case, experiment, STEPS, ROOT, reference, train)


ALIBI = {"position": "alibi"}
SHARED = {"num_heads": 4, "num_kv_heads": 1, "qk_norm": True}
GROUPED = {"num_heads": 6, "num_kv_heads": 3}
PACKED = {"examples": "packed"}
DP2_ZERO_3 = LayoutCase(data=2, zero_stage=3, accumulated=2)


WRONG = [  # the error, a layout that shows it, the model, what differs first: a layer's output, a gradient, the norm, a weight
    (m.no_sum_on_entry, TP2, {}, "the gradient of final_norm.bias in step 1"),
    (m.slices_unmarked, TP2, {}, "the gradient norm in step 1"),
    (m.row_bias_not_summed_over_positions, SP2, {}, "the gradient of blocks.1.mlp.down.bias in step 1"),
    (m.means_of_means, DP2, {}, "the loss in step 1"),
    (m.smoothing_over_own_rows, TP2, {}, "the loss in step 1"),
    (m.smoothing_forgotten, DP2, {}, "the loss in step 1"),
    (m.last_rows_of_the_loss_lost, PP2, {}, "the loss in step 1"),
    (m.last_rows_of_the_gradient_lost, TP2, {}, "the gradient of final_norm.bias in step 1"),
    (m.only_the_first_bucket_reduced, DP2, {}, "the gradient of "),
    (m.only_the_first_sub_group_updated, DP2_ZERO_3, {}, "the output of "),
    (m.clip_forgotten, DP2, {}, "the weight "),
    (m.weight_decay_forgotten, PP2, {}, "the output of embedding in step 2"),
    (m.vectors_decay_too, DP2, {}, "the output of blocks.0 in step 2"),
    (m.warm_up_forgotten, TP2, {}, "the output of embedding in step 2"),
    (m.queries_dealt_out_in_turn, DP2, GROUPED, "the output of blocks.0 in step 1"),
    (m.slopes_a_head_early, TP2, ALIBI, "the output of blocks.0 in step 1"),
    (m.table_rows_shifted, TP2, {}, "the output of embedding in step 1"),
    (m.dropout_by_local_position, SP2, DROPS, "the output of embedding_dropout in step 1"),
    (m.tied_copies_not_summed, PP2, {"tied": True}, "the gradient of embedding.weight in step 1"),
    (m.context_lost_on_the_way, PP2, DROPS, "the output of blocks.0 in step 1"),
    (m.segments_dropped_at_a_stage_border, PP2, PACKED, "the output of blocks.1 in step 1"),
    (m.shared_head_counted_twice, TP2, SHARED, "the gradient of blocks.1.attention.qkv.bias in step 1"),
    (m.summed_again_on_exit, TP2, {}, "the gradient of blocks.1.mlp.down.weight in step 1"),
    (m.bias_before_the_sum, TP2, {}, "in step 2"),
    (m.norms_not_summed_over_positions, SP2, {}, "the gradient of final_norm.bias in step 1"),
    (m.positions_of_rank_one_shifted, SP2, {}, "the output of position in step 1"),
    (m.drawn_per_rank, TP2, {}, "the output of blocks.0 in step 1"),
    (m.accumulation_forgotten, PP2, {}, "the loss in step 1"),
    (m.everyone_reads_the_first_share, DP2, {}, "the output of embedding in step 1"),
    (m.padding_gets_probability, TP2, {}, "the loss in step 1"),
    (m.dropout_by_local_feature, TP2, DROPS, "the output of blocks.0 in step 1"),
    (m.slopes_of_the_first_heads, TP2, ALIBI, "the output of blocks.0 in step 1"),
    (m.shared_head_of_own_queries, TP2, SHARED, "the gradient of blocks.1.attention.qkv.bias in step 1"),
]
FAST_WRONG = (
    *("no_sum_on_entry", "slices_unmarked", "means_of_means", "clip_forgotten", "last_rows_of_the_gradient_lost"),
    *("only_the_first_bucket_reduced", "table_rows_shifted", "dropout_by_local_position", "tied_copies_not_summed"),
    "context_lost_on_the_way",
)
"""At least one error along every axis and in every quantity that is compared. The others are slow."""


@pytest.mark.parametrize(
    ("mutation", "case", "model", "first"),
    [pytest.param(*row, id=row[0].__name__, marks=[] if row[0].__name__ in FAST_WRONG else pytest.mark.slow) for row in WRONG],
)
def test_what_is_wrong_is_found_and_named(mutation, case, model, first):
    row = verdict(case, model, m.mutated(mutation))
    assert row.verdict == "FAILED"
    assert not row.why, row.why
    assert max(row.loss, row.norm, row.output, row.gradient, row.weight) > 10 * TOLERANCE
    assert first in row.first
    assert str(row).splitlines()[1] == row.first


CASES = {"TP2": TP2, "SP2": SP2, "DP2": DP2, "PP2": PP2}
MODELS = {
    "plain": {},
    "dropout": DROPS,
    "packed": PACKED | DROPS | ALIBI,
    "alibi": ALIBI,
    "shared kv head": SHARED | {"head_size": 24, "output_bias": False},
}
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
    assert 0 < max(row.output, row.gradient, row.weight) <= TOLERANCE and not row.first


def test_a_rank_that_raises_is_shown(tmp_path):
    row = verdict(TP2, {}, m.functools.partial(m.train_mutated, "there_is_no_such_mutation"))
    assert row.verdict == "FAILED"
    assert "rank 0" in row.why
    assert "KeyError" in row.why


@pytest.mark.slow
def test_a_layout_that_hangs_says_so_soon_and_where_each_rank_stands(tmp_path, capsys, monkeypatch):
    """The other layouts follow."""
    monkeypatch.setattr(numbers, "pairwise", lambda world: [TP2, DP2])
    hanging = m.mutated(m.rank_one_waits_for_a_message, hang_seconds=15.0)
    monkeypatch.setattr(numbers, "row_of", functools.partial(row_of, train=hanging))
    with pytest.raises(SystemExit) as left:
        verify.main([str(copied("gpt_sotu", tmp_path)), "--ranks", "2", "--steps", "1"])
    lines, rows = capsys.readouterr().out.splitlines(), json.loads((tmp_path / "runs/gpt_sotu/verify.json").read_text())["rows"]
    assert left.value.code == 1 and [row["verdict"] for row in rows] == ["FAILED", "pass"]
    assert sum(line.startswith(f"FAILED   {TP2} · hangs: no rank made progress for") for line in lines) == 1
    assert sum(line.strip().startswith("rank 0 in step 1, forward from embedding on, waits in all_reduce") for line in lines) == 1
    assert sum(line.strip().startswith("rank 1 in step 1, forward from embedding on, waits in recv") for line in lines) == 1
    assert any(line.strip().startswith("parallel/") for line in lines)
    assert rows[0]["seconds"] < 60 and set(rows[0]["stacks"]) == {"0", "1"}


@pytest.mark.slow
@pytest.mark.parametrize("case", [DP2, DP2_ZERO_3, PP2, LayoutCase(data=2, zero_stage=2)], ids=str)
def test_an_experiment_with_offload_passes_also_where_there_is_none(case):
    parallel = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}
    experiment = layouts.shrunk(example(parallel=parallel), 2, STEPS)
    _, reference = subject_and_reference("{}")
    clip = subject_and_reference("{}")[0].optimizer.clip
    experiment = experiment.model_copy(update={"optimizer": experiment.optimizer.model_copy(update={"clip": clip})})
    assert row_of(case, experiment, STEPS, ROOT, reference).verdict == "pass"


def test_every_way_of_running_stands_beside_every_axis():
    for world in (2, 4, 8):
        found = layouts.pairwise(world)
        assert {case.world for case in found} == {world}
        assert {(case.pipe, case.data, case.tensor) for case in found} == set(layouts.grids(world))
        for axis in ("pipe", "data", "tensor"):
            along = [case for case in found if getattr(case, axis) > 1]
            assert {case.recompute for case in along} == set(layouts.RECOMPUTES)
            assert {case.accumulated for case in along} == {n for case in along for n in (1, 2 * case.pipe)}
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


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("heads", [(6, 6), (6, 3), (8, 2), (7, 1)], ids=str)
def test_heads_stay_grouped_and_several_lie_on_each_of_two_ranks(heads, ranks):
    shrunk = layouts.shrunk(example(model={"hidden_size": 336, "num_heads": heads[0], "num_kv_heads": heads[1]}), ranks)
    ours, theirs = shrunk.model.num_kv_heads, heads[1]
    assert shrunk.model.num_heads >= 4 and (ours == shrunk.model.num_heads) == (theirs == heads[0])
    assert (ours == 1) == (theirs == 1)
    assert all(layouts.why_not(LayoutCase(tensor=tensor), shrunk) is None for tensor in (2, 4, 8) if tensor <= ranks)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
def test_every_term_counts_in_the_shrunk_experiment(decay):
    """Whatever the experiment's own values are: each step has another learning rate, and the clip binds in one step and not in another."""
    own = {"lr": 1e-6, "weight_decay": 0.0, "label_smoothing": 0.0, "clip": 0.0, "warmup_steps": 0, "decay": decay, "min_lr": 0.0}
    written = example(optimizer=own | ({"decay_steps": 9} if decay == "wsd" else {}))
    with one_thread():
        shrunk = training.binding_clip(layouts.shrunk(written, 2, 4), 4, ROOT)
        norms = training.reference_run(shrunk, 4, ROOT).norms
    assert min(norms) < 0.9 * shrunk.optimizer.clip and 1.1 * shrunk.optimizer.clip < max(norms)
    rates = [learning_rate(step, shrunk.optimizer, shrunk.schedule.steps) for step in range(4)]
    assert rates[0] < rates[1] == shrunk.optimizer.lr and min(rates) > 0 and (rates[3] < rates[1] or decay == "constant")
    assert shrunk.optimizer.weight_decay == shrunk.optimizer.label_smoothing == 0.1


def test_an_experiments_own_deepspeed_table_is_kept_but_for_its_precision():
    table = {"zero_optimization": {"round_robin_gradients": True}, "data_types": {"grad_accum_dtype": "fp32"}, "fp16": {"hysteresis": 3}}
    shrunk = layouts.shrunk(example(deepspeed=table), 2)
    assert shrunk.deepspeed["zero_optimization"]["round_robin_gradients"] and shrunk.deepspeed["data_types"] == table["data_types"]
    assert "fp16" not in shrunk.deepspeed and shrunk.precision == "fp32"


ADAMW = {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
REPEATED = [  # tables that repeat what is derived for the example's own training
    {"gradient_clipping": 1.0},
    {"train_micro_batch_size_per_gpu": 8},
    {"gradient_accumulation_steps": 2},
    {"optimizer": {"type": "AdamW", "params": ADAMW}},
    {"zero_optimization": {"stage": 1}},
    {"zero_optimization": {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}},
    {"zero_optimization": {"overlap_comm": True, "contiguous_gradients": True}},
]


@pytest.mark.parametrize("table", REPEATED, ids=str)
def test_a_table_that_repeats_what_training_derives_does_not_contradict_what_verify_derives(table):
    own = example(deepspeed=table)
    derive(engine_settings(own, layout(own, 1)), cuda=True)  # the experiment's own training accepts it
    for case in (LayoutCase(data=2, zero_stage=stage, accumulated=4) for stage in layouts.STAGES):
        settings = training.settings_of(layouts.shrunk(own, 2), case)
        derived = derive(dataclasses.replace(settings, clip=0.5), cuda=False)  # as binding_clip changes it
        assert derived["zero_optimization"]["stage"] == case.zero_stage
        assert derived["zero_optimization"]["reduce_bucket_size"] == layouts.BUCKET_ELEMENTS


SHARING = """
import torch
from models.gpt import TokenLoss
from models.norm import LayerNorm

BUILT = set()


class Counted(LayerNorm):
    def __init__(self, name, *arguments, **settings):
        super().__init__(name, *arguments, **settings)
        BUILT.add(name)


class Scaled(TokenLoss):
    def __call__(self, logits, labels):
        return super().__call__(logits, labels) * len(BUILT)


class Adam(torch.optim.AdamW):
    state_names = ("exp_avg", "exp_avg_sq")


def constant(step, optimizer, steps):
    return optimizer.lr / len(BUILT)
"""


@pytest.mark.slow
def test_the_classes_of_a_variant_py_share_their_modules_state(tmp_path):
    """A loss and a learning rate that depend on how many norms were built, and are 0 or fail if the file is run again for them."""
    (tmp_path / "variant.py").write_text(SHARING)
    named = {"name": "variant:Adam", "decay": "variant:constant"}
    written = example(model={"norm": "variant:Counted"}, loss="variant:Scaled", optimizer=named)
    experiment = layouts.shrunk(written, 2, 1)
    with one_thread():
        reference = training.reference_run(experiment, 1, tmp_path)
    row = row_of(LayoutCase(data=2), experiment, 1, tmp_path, reference)
    assert row.verdict == "pass", row
    assert reference.losses[0] > 10  # several norms times log(vocabulary)


def test_a_missing_or_infinite_parameter_is_infinitely_wrong():
    truth = {"a": torch.ones(2), "b": torch.ones(2)}
    assert worst(errors_of([{"a": torch.ones(2)}], truth)) == (torch.inf, "b")
    assert worst(errors_of([{"a": torch.ones(2), "b": torch.full((2,), torch.nan)}], truth)) == (torch.inf, "b")
    assert worst(errors_of([truth, {"b": torch.tensor([1.0, 1.5])}], truth))[1] == "b"


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 4), (2, 8, 4), (2, 16, 4, 1)], ids=str)
def test_a_tensor_of_another_shape_is_infinitely_wrong(shape):
    assert errors_of([{"a": torch.ones(shape)}], {"a": torch.ones(2, 16, 4)}) == {"a": torch.inf}


@pytest.mark.parametrize("case", [TP2, SP2, DP2], ids=str)
@pytest.mark.parametrize("name", ["blocks.0@0", "head@0"])
def test_an_output_that_one_rank_lacks_or_has_in_another_shape_is_infinitely_wrong(case, name):
    experiment = subject()
    model = experiment.model
    width = -(-model.vocab_size // case.tensor) if name == "head@0" else model.hidden_size
    length = model.seq_length // case.tensor if case.sequence and name != "head@0" else model.seq_length
    rows = layouts.BATCH // case.data
    reference = {name: torch.ones(layouts.BATCH, model.seq_length, model.vocab_size if name == "head@0" else width)}

    def errors(*by_rank):
        return errors_of(whole_outputs([TrainingRecord(outputs=outputs) for outputs in by_rank], case, experiment), reference)

    right = {name: torch.ones(rows, length, width)}
    assert errors(right, right) == {name: 0.0}
    for wrong in ({}, {name: torch.ones(rows, length, width - 1)}, {name: torch.ones(rows, length - 1, width)}):
        assert errors(right, wrong) == errors(wrong, right) == {name: torch.inf}


def test_a_negligible_gradient_is_measured_against_the_whole():
    truth = {"big": torch.full((4,), 100.0), "zero": torch.tensor([1e-9])}
    assert worst(errors_of([{"big": truth["big"], "zero": torch.tensor([3e-9])}], truth))[0] < 1e-10


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
        *("cut", "verdict", "loss", "norm", "output", "output_at", "gradient", "gradient_at", "weight", "weight_at"),
        *("first", "seconds", "why", "stacks"),
    ]


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
