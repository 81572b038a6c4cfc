"""`verify --types` passes correct models, and names the layer and line of errors, on tensor degrees larger than this machine."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist

from models import norm, position
from parallel import collectives, cross_entropy, distributed, linear, region
from research import ROOT
from research.cli import verify
from research.config.checks import kv_heads_fit
from research.verification import spmd_check
from research.verification.spmd_check import Fault, TensorCase, fault_of
from tests.harness import run_ranks
from tests.research.helpers import mutations as m
from tests.research.helpers.example import example, sentence

pytest.importorskip("spmd_types")


DROPS = {f"{place}_dropout": 0.1 for place in ("embedding", "residual", "mlp", "attention")}
ROTARY = {"position": "rotary", "rotary_fraction": 1.0, "rotary_base": 1e4, "rotary_scaling": "none"}
LLAMA = {**ROTARY, "norm": "rmsnorm", "mlp": "swiglu", "num_kv_heads": 2, "bias": False, "qkv_bias": False}
ALIBI = {"position": "alibi"}
SHARED = {"num_kv_heads": 1, "qk_norm": True, "head_size": 48, "output_bias": False}
TP2, SP2, TP4 = TensorCase(2, False, "none"), TensorCase(2, True, "none"), TensorCase(4, False, "none")


def subject(degree, **model):
    return spmd_check.fitted(example(model=model, optimizer={"label_smoothing": 0.1}), degree)


CASES = [
    TensorCase(64, True, "selective"),
    TensorCase(4, True, "full"),
    pytest.param(TP2, marks=pytest.mark.slow),
    pytest.param(TensorCase(6, False, "selective"), marks=pytest.mark.slow),
]
RIGHT = {
    "gpt, tied": {},
    "llama, untied": {**LLAMA, "tied": False},
    "drops, tied": DROPS,
    "shared kv heads that drop": SHARED | DROPS,
    "alibi, post_norm": {**ALIBI, "residual": "post_norm"},
    "sinusoidal, parallel": {"position": "sinusoidal", "residual": "parallel", "tied": False},
}


@pytest.mark.parametrize("model", RIGHT.values(), ids=RIGHT.keys())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_right_is_well_typed(model, case):
    row = spmd_check.row_of(subject(case.tensor, **model), case, {})
    assert row.verdict == "pass", row.fault


def summed_twice_on_exit():
    """g of g: what is already equal on every rank is summed again."""
    leave = region.TensorParallelRegion.leave
    region.TensorParallelRegion.leave = lambda self, x: leave(self, leave(self, x))


def not_summed_on_exit():
    """Every rank continues with its own summand."""
    region.TensorParallelRegion.leave = lambda self, x: x


def joined_where_gathered():
    """A sliced region is entered as if what follows were replicated: the ranks' gradients are not summed."""
    region.gather_sequence = collectives.join_sequence


def table_not_summed_over_positions():
    """Each rank keeps the gradient of its own positions' rows."""
    position.copy_to_tensor_ranks = lambda x, group: x


def head_norms_not_summed():
    """The norm of queries keeps the gradient of this rank's heads."""
    build = norm.Norm.__init__

    def alone(self, name, size, model, partial_group, bias):
        build(self, name, size, model, None if "q_norm" in name else partial_group, bias)

    norm.Norm.__init__ = alone


def copied_twice():
    """The gradient of what enters a sliced region is summed, and its sum summed again."""
    enter = region.TensorParallelRegion.enter
    region.TensorParallelRegion.enter = lambda self, x: enter(self, enter(self, x))


def cross_entropy_of_own_rows():
    """The softmax runs over a rank's own rows of the vocabulary."""
    forward = cross_entropy._CrossEntropy.forward
    cross_entropy._CrossEntropy.forward = staticmethod(
        lambda ctx, logits, targets, group, *sizes: forward(ctx, logits, targets, None, *sizes)
    )


def cross_entropy_summed_in_backward():
    """The gradient of the logits, a rank's own, is summed over ranks."""
    backward = cross_entropy._CrossEntropy.backward

    def summed(ctx, gradient):
        grad, *rest = backward(ctx, gradient)
        return collectives.all_reduce(grad, dist.group.WORLD), *rest

    cross_entropy._CrossEntropy.backward = staticmethod(summed)


def forgotten_when_run_again():
    """A recomputed block enters its sliced regions without the sum of gradients."""
    enter = region.TensorParallelRegion.enter
    region.TensorParallelRegion.enter = lambda self, x: x if torch._C._current_graph_task_id() >= 0 else enter(self, x)


def bias_left_out():
    """A parameter that nothing uses."""
    linear.RowParallelLinear.forward = lambda self, x: self.region.leave(torch.nn.functional.linear(x, self.weight))


def broadcast_on_exit():
    """A collective that no rule is written for."""

    def leave(self, x):
        dist.broadcast(x.detach(), 0, group=self.group)
        return x

    region.TensorParallelRegion.leave = leave


def summed_outside_autograd():
    """A sum that autograd does not record: the gradient stays as it is."""

    def leave(self, x):
        dist.all_reduce(x, group=self.group)
        return x

    region.TensorParallelRegion.leave = leave


WRONG = [  # what is broken, a layout that shows it, the model, the layer or parameter said, the file said
    (m.no_sum_on_entry, TP2, {}, "blocks.0.attention.qkv", "parallel/linear.py"),
    (m.summed_again_on_exit, TP2, {}, "position", "models/position.py"),
    (m.bias_before_the_sum, TP2, {}, "blocks.0.attention.output.bias", "tests/research/helpers/mutations.py"),
    (m.norms_not_summed_over_positions, SP2, {}, "blocks.0.attention_norm.weight", "models/norm.py"),
    (m.row_bias_not_summed_over_positions, SP2, {}, "blocks.0.attention.output.bias", "parallel/linear.py"),
    (m.shared_head_of_own_queries, TP4, SHARED, "blocks.0.attention.k_norm", "models/norm.py"),
    (summed_twice_on_exit, TP2, {}, "embedding", "parallel/region.py"),
    (not_summed_on_exit, TP2, {}, "position", "models/position.py"),
    (joined_where_gathered, SP2, {}, "blocks.0.attention.qkv", "parallel/linear.py"),
    (table_not_summed_over_positions, SP2, {}, "position", "models/position.py"),
    (head_norms_not_summed, TP2, SHARED, "blocks.0.attention.q_norm.weight", "models/norm.py"),
    (copied_twice, TP2, {}, "blocks.0.attention.qkv", "parallel/region.py"),
    (cross_entropy_of_own_rows, TP2, {}, "the loss", "models/gpt.py"),
    (cross_entropy_summed_in_backward, TP2, {}, "_CrossEntropy", "parallel/cross_entropy.py"),
    (summed_outside_autograd, TP2, {}, "embedding", "tests/research/verification/test_spmd_check.py"),
    (broadcast_on_exit, TP2, {}, "broadcast", "tests/research/verification/test_spmd_check.py"),
    (forgotten_when_run_again, TensorCase(2, False, "full"), {}, "blocks.1.attention.qkv", "parallel/linear.py"),
    (bias_left_out, TP2, {}, "blocks.0.attention.output.bias", ""),
]
INVISIBLE = [  # wrong numbers of the right type; one of each kind that docs/layouts.md lists is fast
    (m.slices_unmarked, TP2, {}),
    (m.positions_of_rank_one_shifted, SP2, {}),
    (m.drawn_per_rank, TP2, {}),
    (m.padding_gets_probability, TP2, {}),
]
INVISIBLE_TOO = [
    (m.smoothing_over_own_rows, TP2, {}),
    (m.dropout_by_local_position, SP2, DROPS),
    (m.dropout_by_local_feature, TP2, DROPS),
    (m.slopes_of_the_first_heads, TP2, ALIBI),
    (m.shared_head_counted_twice, TP2, SHARED),
]


def broken(mutation, case, model) -> Fault | None:
    """Runs in a process of its own: the mutation, then the check, whose fake world replaces that of the harness."""
    distributed.stop()
    mutation()
    fault = fault_of(subject(case.tensor, **model), case, {}, 0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the harness asks for this rank's number
    return fault


@pytest.mark.parametrize(("mutation", "case", "model", "near", "file"), WRONG, ids=[row[0].__name__ for row in WRONG])
def test_what_is_wrong_is_a_type_error_with_a_line(mutation, case, model, near, file):
    (fault,) = run_ranks(broken, 1, mutation, case, model)
    assert fault is not None
    assert near in f"{fault.layer} {fault.what}", fault
    said, _, number = fault.source.partition(":")
    assert (said, number.isdigit()) == (file, bool(file)), fault


@pytest.mark.parametrize(
    ("mutation", "case", "model"),
    [
        *(pytest.param(*row, id=row[0].__name__) for row in INVISIBLE),
        *(pytest.param(*row, id=row[0].__name__, marks=pytest.mark.slow) for row in INVISIBLE_TOO),
    ],
)
def test_what_types_cannot_see(mutation, case, model):
    """As docs/layouts.md says, only the numbers show these errors."""
    assert run_ranks(broken, 1, mutation, case, model) == [None]


def test_the_command_names_the_line_of_a_variant_that_forgets_a_sum(tmp_path, capsys):
    """An experiment's own class, which forgets to sum the gradient of one parameter under sequence parallelism."""
    folder = tmp_path / "forgetful"
    shutil.copytree(ROOT / "experiments/gpt_sotu_dyt", folder)
    variant = (folder / "variant.py").read_text()
    wrong = "copy_to_tensor_ranks(self.alpha, self.partial_group)"
    assert wrong in variant
    (folder / "variant.py").write_text(variant.replace(wrong, "self.alpha"))
    config = (folder / "config.py").read_text()
    (folder / "config.py").write_text(config.replace('Track(project="tessera")', f'Track(project="tessera", runs="{tmp_path}/runs")'))

    assert spmd_check.check_types(folder, [2]) == 1
    said = capsys.readouterr().out
    line = next(i for i, text in enumerate((folder / "variant.py").read_text().splitlines(), start=1) if "torch.tanh" in text)
    assert f"variant.py:{line}" in said
    assert "the gradient of blocks.0.attention_norm.alpha is left partial" in said
    assert (said.count("\npass "), said.count("\nFAILED ")) == (3, 3)
    assert "3 of 6 layouts are well typed" in said
    rows = json.loads((tmp_path / "runs/forgetful/types.json").read_text())["rows"]
    assert [row["verdict"] for row in rows] == ["pass"] * 3 + ["FAILED"] * 3
    assert rows[3]["cut"] == {"tensor": 2, "sequence": True, "recompute": "none"}
    assert rows[3]["fault"]["source"].endswith(f"variant.py:{line}")


def test_an_experiment_of_ours_is_well_typed(tmp_path, capsys):
    folder = tmp_path / "llama"
    shutil.copytree(ROOT / "experiments/llama_sotu", folder)
    config = (folder / "config.py").read_text()
    (folder / "config.py").write_text(config.replace('Track(project="tessera")', f'Track(project="tessera", runs="{tmp_path}/runs")'))
    threads = torch.get_num_threads()
    assert spmd_check.check_types(folder, [4]) == 0
    assert "6 of 6 layouts are well typed" in capsys.readouterr().out
    assert not dist.is_initialized()
    assert torch.get_num_threads() == threads


def test_what_cannot_be_checked_is_refused(monkeypatch):
    folder = ROOT / "experiments/gpt_sotu"
    assert "check 2 or more" in sentence(lambda: spmd_check.check_types(folder, [2, 1]))
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None)
    assert "pip install -r requirements-dev.txt" in sentence(lambda: verify.main([str(folder), "--types"]))


@pytest.mark.parametrize("degree", [2, 3, 4, 6, 8, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2), (6, 1)])
def test_sizes_fit_and_structure_stays(degree, heads, kv_heads):
    model = subject(degree, num_heads=heads, num_kv_heads=kv_heads).model
    assert kv_heads_fit(model, degree)
    assert model.num_heads % model.num_kv_heads == 0
    assert [size % degree for size in (model.num_heads, model.ffn_size, model.seq_length)] == [0, 0, 0]
    assert model.vocab_size % degree
    assert (model.num_kv_heads < model.num_heads) == (kv_heads < heads)
    assert model.hidden_size == model.num_heads * model.head_size
