"""What real engines communicate equals hand-written counts on eight layouts, exactly, and wrong layouts are named."""

import functools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from research import ROOT
from research.verification import layouts, ledger
from research.verification.layouts import LayoutCase
from research.verification.ledger import Row, row_of
from tests.harness import start_server
from tests.research.helpers import mutations as m
from tests.research.helpers.example import example


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """The tests' own server, from which research.cluster.forked_ranks then forks too."""
    start_server()


def subject(ranks: int, **model):
    return layouts.shrunk(example(model=model), ranks)


@functools.cache
def row(case: LayoutCase, model: tuple = ()) -> Row:
    return row_of(case, subject(case.world, **dict(model)), ROOT)


def found(row: Row, rank: int, axis: str, layer: str = "", least: int = 0) -> Counter:
    """(operation, elements) -> calls, both directions, as counted."""
    counts: Counter = Counter()
    for line in row.lines[rank]:
        if (line.kind.axis, line.kind.layer) == (axis, layer) and line.kind.elements >= least:
            counts[line.kind.operation, line.kind.elements] += line.found
    return counts


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


PP2_SP2 = LayoutCase(pipe=2, tensor=2, sequence=True, accumulated=2)
TENSOR = [  # the layout; all-reduces or gather-and-scatters of b·s·h of one block in one step
    (LayoutCase(tensor=2), 4),
    (LayoutCase(data=2, tensor=2, zero_stage=3, recompute="full"), 5),
    (PP2_SP2, 8),
    slow(LayoutCase(tensor=2, accumulated=2), 8),
    slow(LayoutCase(tensor=4, zero_stage=2), 4),
    slow(LayoutCase(tensor=2, sequence=True), 4),
    slow(LayoutCase(tensor=4, sequence=True, recompute="selective", zero_stage=2), 4),
    slow(LayoutCase(pipe=2, tensor=2, recompute="full"), 5),
]


@pytest.mark.parametrize(("case", "times"), TENSOR, ids=str)
def test_a_block_and_the_loss_on_a_real_engine(case: LayoutCase, times: int) -> None:
    """Four all-reduces of b·s·h per block and micro-batch, or four gathers and four scatters; O(b·s) for the cross entropy."""
    counted = row(case)
    assert counted.verdict == "pass", counted
    model, b = subject(case.world).model, layouts.BATCH // case.data // case.accumulated
    s, h = model.seq_length, model.hidden_size
    blocks = {line.kind.layer for line in counted.lines[0] if line.kind.layer.startswith("blocks.")}
    assert len(blocks) == model.num_layers // case.pipe
    for block in blocks:
        operations = ("all_gather", "reduce_scatter") if case.sequence else ("all_reduce",)
        assert found(counted, 0, "tensor", block, b * s * h) == {(operation, b * s * h): times for operation in operations}
    losses = found(counted, case.world - 1, "tensor", "loss")
    assert losses == {("all_reduce", b * s): case.accumulated, ("all_reduce", 3 * b * s): case.accumulated}


@pytest.mark.parametrize("case", [LayoutCase(pipe=4, accumulated=4), PP2_SP2, slow(LayoutCase(pipe=2, data=2))], ids=str)
def test_a_pipeline_on_a_real_engine(case: LayoutCase) -> None:
    """b·s·h (over t, where the sequence is sliced) per boundary, direction and micro-batch; the tied table once."""
    counted, model = row(case), subject(case.world).model
    size = layouts.BATCH // case.data // case.accumulated * model.seq_length * model.hidden_size // (case.tensor if case.sequence else 1)
    table = -(-model.vocab_size // case.tensor) * model.hidden_size
    assert counted.verdict == "pass"
    for rank in range(case.world):
        stage = rank // (case.data * case.tensor)
        inner = (stage > 0) + (stage < case.pipe - 1)
        tied = {("all_reduce", table): 1} if stage in (0, case.pipe - 1) else {}
        assert found(counted, rank, "pipe") == {("send", size): inner * case.accumulated, ("recv", size): inner * case.accumulated} | tied


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_on_a_real_engine(stage: int) -> None:
    """2(d−1)/d·P at stage 1; m micro-batches reduce m times at stages 2 and 3."""
    case = LayoutCase(data=2, zero_stage=stage, accumulated=2)
    counted, model = row(case), subject(2).model
    h, f, layers = model.hidden_size, model.ffn_size, model.num_layers
    whole = model.vocab_size * h + model.seq_length * h + layers * (4 * h * h + 2 * h * f + 4 * h + f + h + 4 * h) + 2 * h
    assert counted.verdict == "pass"
    reduced = {1: ("all_reduce", whole), 2: ("all_reduce", 2 * whole), 3: ("reduce_scatter", 2 * whole)}[stage]
    assert found(counted, 0, "data") == {reduced: 1, ("all_gather", whole): 1}
    assert counted.sent["data"] == 4 * whole * {1: 1.5, 2: 2.5, 3: 1.5}[stage]


SHARED = (("num_heads", 4), ("num_kv_heads", 1), ("qk_norm", True), ("head_size", 24), ("output_bias", False))
ROTARY = (("position", "rotary"), ("rotary_fraction", 1.0), ("rotary_base", 1e4), ("rotary_scaling", "none"))
POST = (("residual", "post_norm"), *ROTARY, ("tied", False))


TP4, PP2_TP2 = LayoutCase(tensor=4, sequence=True, recompute="full"), LayoutCase(pipe=2, tensor=2, recompute="full")


@pytest.mark.parametrize(
    ("case", "model"),
    [
        pytest.param(TP4, SHARED, id="TP4, shared kv head"),
        pytest.param(PP2_TP2, POST, id="PP2 TP2, post-norm"),
        pytest.param(TP4, POST, id="TP4, post-norm", marks=pytest.mark.slow),
        pytest.param(PP2_TP2, SHARED, id="PP2 TP2, shared kv head", marks=pytest.mark.slow),
    ],
)
def test_other_structures_have_closed_forms_too(case: LayoutCase, model: tuple) -> None:
    counted = row(case, model)
    assert counted.verdict == "pass", [line for lines in counted.lines.values() for line in lines if line.expected != line.found]


# Layouts with an error.


def skipped_by_rank_1() -> None:
    """Rank 1 leaves out every all-reduce of a forward pass."""
    import torch.distributed as dist

    from parallel import collectives, region

    if dist.get_rank() == 1:
        region.TensorParallelRegion.leave = lambda self, x: collectives.copy_to_tensor_ranks(x, self.group)


def other_size_on_rank_1() -> None:
    """Rank 1 gathers what the others reduce."""
    import torch.distributed as dist

    from parallel import collectives, region

    if dist.get_rank() == 1:
        gathered = collectives.conjugate(lambda x, group: collectives.all_gather(1)(x, group)[:, : x.shape[1]], collectives.identity)
        region.TensorParallelRegion.leave = lambda self, x: gathered(x, self.group)


def asleep_on_all_ranks() -> None:
    """Every rank stands still before its first all-reduce of a forward pass, so that their collectives are equal."""
    import time

    from parallel import region

    region.TensorParallelRegion.leave = lambda self, x: time.sleep(600)


def train(name: str, folder: Path, **settings: float) -> None:
    mutation = globals().get(name) or getattr(m, name)
    mutation()
    ledger.on_rank(folder, **settings)


@pytest.mark.parametrize("mutation", [skipped_by_rank_1, pytest.param(other_size_on_rank_1, marks=pytest.mark.slow)])
def test_ranks_that_disagree_are_found_and_named_instead_of_hanging(mutation) -> None:
    wrong = row_of(LayoutCase(tensor=2), subject(2), ROOT, functools.partial(train, mutation.__name__), patience=15.0)
    assert wrong.verdict == "FAILED"
    assert "ranks 0, 1 differ at their call" in wrong.why
    assert "rank 0: " in wrong.why and "rank 1: " in wrong.why and "parallel/collectives.py" in wrong.why


@pytest.mark.slow
def test_ranks_that_stand_still_without_disagreeing_are_ended_and_described() -> None:
    train_asleep = functools.partial(train, asleep_on_all_ranks.__name__, hang_seconds=10.0)
    wrong = row_of(LayoutCase(tensor=2), subject(2), ROOT, train_asleep)
    first, rank_0, *_ = wrong.why.splitlines()
    assert wrong.verdict == "FAILED" and first.startswith("hangs: no rank made progress for")
    assert rank_0.startswith("rank 0 in step 1, forward from embedding on")


@pytest.mark.parametrize(
    ("mutation", "case", "layer", "direction"),
    [
        (m.no_sum_on_entry, LayoutCase(tensor=2), "blocks.0", "backward"),
        (m.norms_not_summed_over_positions, LayoutCase(tensor=2, sequence=True), "final_norm", "backward"),
        slow(m.summed_again_on_exit, LayoutCase(tensor=2), "blocks.0", "backward"),
        slow(m.row_bias_not_summed_over_positions, LayoutCase(tensor=2, sequence=True), "blocks.1", "backward"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_too_few_or_too_many_are_found_and_named(mutation, case: LayoutCase, layer: str, direction: str) -> None:
    wrong = row_of(case, subject(2), ROOT, functools.partial(train, mutation.__name__))
    assert wrong.verdict == "FAILED" and not wrong.why
    differing = {(line.kind.layer, line.kind.direction) for line in wrong.lines[0] if line.expected != line.found}
    assert (layer, direction) in differing


@pytest.mark.slow
def test_the_command_prints_counts_beside_formulas(tmp_path) -> None:
    """In a process of its own, on an experiment with its own class, so that the tensor axis has no closed form."""
    command = [sys.executable, "-m", "research", "verify", "experiments/gpt_sotu_dyt", "--ranks", "2", "--ledger"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\npass ") == 9
    assert "1 × P, padded = " in done.stdout and "tensor axis not compared" in done.stdout
    rows = json.loads((ROOT / "runs/gpt_sotu_dyt/ledger.json").read_text())["rows"]
    assert [row["verdict"] for row in rows] == ["pass"] * 9
