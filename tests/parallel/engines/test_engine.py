"""Every layout trains the same model: twenty steps on each layout against one rank, and one rank against plain torch.

Also: evaluation leaves no trace in training, the comparison detects deliberate mistakes, and what the last stage of each data rank
computes from its logits is on every rank, in the order of data ranks.
"""

import functools
import itertools
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from models import gpt
from models.config import GPT
from parallel.engines import engine as engines
from parallel.engines.engine import gather_from_last_stages
from parallel.engines.micro_batch import MicroBatch
from parallel.engines.pipeline import LogitsHook, instead_of_loss
from parallel.errors import Mistake
from parallel.grid import Grid, make_grid
from parallel.layers import PlainModule
from parallel.region import TensorParallelRegion
from parallel.slices import slice_of
from tests.harness import RankFailed, run_ranks
from tests.parallel.helpers import training
from tests.parallel.helpers.checkpoints import all_but_slow
from tests.parallel.helpers.training import BETAS, CLIP, EPS, LABEL_SMOOTHING, LLAMA, MODEL, SEED, STEPS, WEIGHT_DECAY

LOSS, NORM, WEIGHTS, LOW_PRECISION_LOSS = 2e-5, 1e-5, 1e-5, 1e-3
"""Relative errors that are allowed."""
PATIENCE = 480.0
"""Seconds until a run is given up: four tensor ranks along the sequence are slow where there are fewer idle cores than ranks."""

DROPPING = dict(num_layers=2, embedding_dropout=0.1, residual_dropout=0.1, mlp_dropout=0.1, attention_dropout=0.1)
DEEP = DROPPING | dict(num_layers=4)
SUBJECTS = {"tied": {}, "untied": {"tied": False}, "llama": LLAMA, "dropping": DROPPING, "dropping llama": LLAMA | DROPPING, "deep": DEEP}
LAYOUTS = {  # name: ranks, settings; the micro-batch's size is part of what must not matter
    "one rank": (1, {}),
    "TP2": (2, dict(tensor=2)),
    "TP4": (4, dict(tensor=4)),
    "PP2": (2, dict(pipe=2, micro=1)),  # more micro-batches than stages, as a pipeline is used
    "PP4": (4, dict(pipe=4)),
    "DP2": (2, dict(micro=2)),
    "TP2·PP2": (4, dict(tensor=2, pipe=2)),
    "TP2·DP2": (4, dict(tensor=2)),
    "PP2·DP2": (4, dict(pipe=2, micro=2)),
    "ZeRO-0": (2, dict(zero_stage=0, micro=2)),
    "ZeRO-2": (2, dict(zero_stage=2)),
    "ZeRO-3": (2, dict(zero_stage=3)),
    "TP2·ZeRO-2": (4, dict(tensor=2, zero_stage=2)),
    "TP2·ZeRO-3": (4, dict(tensor=2, zero_stage=3)),
    "ZeRO-2, optimizer offloaded": (2, dict(zero_stage=2, offload_optimizer=True)),
    "ZeRO-3, optimizer offloaded": (2, dict(zero_stage=3, offload_optimizer=True)),
    "ZeRO-3, all offloaded": (2, dict(zero_stage=3, offload_optimizer=True, offload_parameters=True)),
}
BEYOND = [("tied", "TP4"), ("tied", "PP4"), ("tied", "ZeRO-0"), ("tied", "TP2·ZeRO-2"), ("untied", "ZeRO-3"), ("llama", "TP2·ZeRO-3")]
EACH = [("tied", layout) for layout in LAYOUTS if layout != "one rank" and ("tied", layout) not in BEYOND]
EACH += [("untied", "PP2"), ("untied", "TP2·PP2"), ("llama", "TP2"), ("llama", "TP2·PP2")]

CUT_LONG = {  # along the sequence, with recomputation, or both: where dropout's masks could go wrong
    "TP2·SP": (2, dict(tensor=2, sequence=True)),
    "TP2·SP, selective": (2, dict(tensor=2, sequence=True, recompute="selective")),
    "TP4·SP, full": (4, dict(tensor=4, sequence=True, recompute="full")),
    "TP2·PP2·SP, selective": (4, dict(tensor=2, pipe=2, sequence=True, recompute="selective", micro=2)),
    "TP2·DP2·SP·ZeRO-2": (4, dict(tensor=2, sequence=True, zero_stage=2, micro=2)),
    "TP2·SP·ZeRO-3, full": (2, dict(tensor=2, sequence=True, zero_stage=3, recompute="full")),
    "PP2, full": (2, dict(pipe=2, recompute="full", micro=2)),
    "DP2, selective": (2, dict(recompute="selective", micro=2)),
}
LAYOUTS |= CUT_LONG
EACH += [("dropping", layout) for layout in CUT_LONG if layout != "TP4·SP, full"]
EACH += [("tied", "TP2·SP, selective"), ("dropping llama", "TP2·SP")]
BEYOND += [("tied", "TP2·SP·ZeRO-3, full"), ("dropping", "TP4·SP, full"), ("dropping llama", "TP2·PP2·SP, selective")]
COSTLY = {  # seconds each, and others show the same in the quick tests: these run with the slow ones
    ("dropping", "TP2·PP2·SP, selective"),
    ("dropping", "TP2·SP·ZeRO-3, full"),
    ("dropping", "TP2·DP2·SP·ZeRO-2"),
    ("dropping", "TP2·SP"),
    ("dropping", "TP4·SP, full"),
    ("tied", "TP2·SP, selective"),
    ("tied", "TP2·ZeRO-3"),
    ("tied", "TP2"),  # in the quick tests: TP2·PP2, with the tied, the untied and the llama model
    ("tied", "PP2"),
    ("tied", "PP2·DP2"),
    ("untied", "PP2"),
    ("llama", "TP2"),
    ("tied", "ZeRO-2"),  # in the quick tests: with the optimizer offloaded, which is the same and more
    ("tied", "ZeRO-3"),  # likewise: with all offloaded
    ("tied", "ZeRO-3, optimizer offloaded"),
    ("tied", "TP4"),
    ("tied", "TP2·ZeRO-2"),
    ("untied", "ZeRO-3"),
    ("llama", "TP2·ZeRO-3"),
    ("tied", "TP2·DP2"),  # in the quick tests: DP2 and TP2·PP2
    ("untied", "TP2·PP2"),  # likewise: with the tied and the llama model
    ("dropping", "TP2·SP, selective"),  # likewise: TP2·SP of the llama model, and TP2·PP2·SP, selective, of it
    ("dropping", "DP2, selective"),
    ("llama", "TP2·PP2"),  # likewise: with the tied model, and TP2·PP2·SP, selective, of the llama model
}
GRIDS_OF_FOUR = {
    "TP4": dict(tensor=4, micro=8),
    "PP4": dict(pipe=4),
    "DP4": {},
    "TP2·PP2": dict(tensor=2, pipe=2),
    "TP2·DP2": dict(tensor=2),
    "PP2·DP2": dict(pipe=2),
}


def on_four_ranks() -> dict[str, dict]:
    """Every grid of four ranks, with and without sequence parallelism, with every ZeRO stage it can have; recomputation on each axis."""
    found = {}
    for name, grid in GRIDS_OF_FOUR.items():
        for sequence in (False, True) if "tensor" in grid else (False,):
            for stage in (1,) if "pipe" in grid else (1, 2, 3):
                found[f"{name}{'·SP' * sequence}·ZeRO-{stage}"] = dict(grid, sequence=sequence, zero_stage=stage)
    for recompute, name in itertools.product(("selective", "full"), ("TP4·SP·ZeRO-1", "PP4·ZeRO-1", "DP4·ZeRO-3", "TP2·PP2·SP·ZeRO-1")):
        found[f"{name}, {recompute}"] = dict(found[name], recompute=recompute)
    return found


FOUR = on_four_ranks()
LAYOUTS |= {name: (4, {"micro": 2, **settings}) for name, settings in FOUR.items()}
LOW = [("tied", layout) for layout in ("TP2", "PP2", "DP2", "TP2·PP2", "ZeRO-2", "ZeRO-3")] + [("untied", "TP2·PP2")]
LOW += [("dropping", "TP2·SP, selective")]
COSTLY_IN_BF16 = {pair for pair in LOW if pair != ("tied", "TP2·PP2")}


def cases(pairs: list[tuple[str, str]], costly: set[tuple[str, str]]) -> list:
    """For parametrize."""
    return [pytest.param(*pair, marks=pytest.mark.slow if pair in costly else ()) for pair in pairs]


@functools.cache
def run(subject: str, layout: str, precision: str = "fp32", steps: int = STEPS) -> list[dict]:
    """Every rank's losses, norms, evaluation and final weights. Run once, shared by all tests of this file."""
    world, settings = LAYOUTS[layout]
    every = dict(settings, model=SUBJECTS[subject], precision=precision, steps=steps, weights=True)
    return run_ranks(training.call, world, every, timeout=PATIENCE)


def furthest(found: list[float], expected: list[float]) -> float:
    """The largest relative error of a list of numbers."""
    assert len(found) == len(expected) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def differences(found: list[dict], expected: dict) -> dict[str, float]:
    """The largest relative error of any rank in each of loss, norm and evaluation, and of any logical parameter (‖a − b‖/‖b‖)."""
    errors = {key: max(furthest(rank[key], expected[key]) for rank in found) for key in ("loss", "norm", "eval")}
    if "weights" in expected:
        joined = {name: tensor for rank in found for name, tensor in rank["weights"].items()}
        assert set(joined) == set(expected["weights"])
        errors["weights"] = max(float((joined[name] - b).norm() / b.norm()) for name, b in expected["weights"].items())
    return errors


def assert_same(errors: dict[str, float]) -> None:
    allowed = {"loss": LOSS, "norm": NORM, "eval": LOSS, "weights": WEIGHTS}
    assert all(errors[key] <= allowed[key] for key in errors), errors


@pytest.mark.parametrize(("subject", "layout"), cases(EACH, COSTLY), ids=lambda name: name)
def test_a_layout_trains_as_one_rank_does(subject: str, layout: str) -> None:
    assert_same(differences(run(subject, layout), run(subject, "one rank")[0]))


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR)
def test_every_layout_of_four_ranks_drops_as_one_rank_does(layout: str) -> None:
    """Twenty steps with dropout everywhere, on four layers."""
    assert_same(differences(run("deep", layout), run("deep", "one rank")[0]))


@pytest.mark.parametrize("subject", all_but_slow(SUBJECTS, set(SUBJECTS) - {"deep"}))
def test_the_clip_binds_and_the_model_learns(subject: str) -> None:
    """Otherwise the norms would be compared, but what is done with them would not."""
    (alone,) = run(subject, "one rank")
    assert len(alone["loss"]) == len(alone["norm"]) == STEPS
    assert min(alone["norm"]) > 2 * CLIP and alone["loss"][-1] < alone["loss"][0] - 0.2


@pytest.mark.parametrize(("subject", "layout"), cases(BEYOND, COSTLY), ids=lambda name: name)
def test_a_layout_begins_as_one_rank_does(subject: str, layout: str) -> None:
    """Five steps: enough for what is not asked for but allowed."""
    assert_same(differences(run(subject, layout, steps=5), run(subject, "one rank", steps=5)[0]))


@pytest.mark.parametrize(("subject", "layout"), cases(LOW, COSTLY_IN_BF16), ids=lambda name: name)
def test_bf16_losses_agree(subject: str, layout: str) -> None:
    (alone,) = run(subject, "one rank", "bf16")
    for found in run(subject, layout, "bf16"):
        assert furthest(found["loss"], alone["loss"]) <= LOW_PRECISION_LOSS
        assert furthest(found["eval"], alone["eval"]) <= LOW_PRECISION_LOSS


def test_bf16_trains_as_fp32_does_but_is_not_fp32() -> None:
    (low,), (full,) = run("tied", "one rank", "bf16"), run("tied", "one rank")
    assert 1e-6 < furthest(low["loss"], full["loss"]) <= 5e-3


def test_stage_zero_is_run_as_stage_one() -> None:
    zero, one = run("tied", "ZeRO-0", steps=5), run("tied", "DP2")
    assert zero[0]["loss"] == one[0]["loss"][:5] and zero[0]["norm"] == one[0]["norm"][:5]


# One rank against plain torch.


def token_mean(logits: torch.Tensor, batch, smoothing: float) -> torch.Tensor:
    """The mean over unmasked tokens, from the mask itself."""
    losses = F.cross_entropy(logits.flatten(0, 1), batch.labels[0].flatten(), reduction="none", label_smoothing=smoothing)
    mask = batch.labels[1].flatten() > 0
    return losses[mask].sum() / mask.sum()


def trained_by_torch_alone(subject: str) -> dict:
    """The plain module, AdamW and clipping by torch, the whole global batch in one pass; nothing of an engine."""
    shape = GPT(**MODEL | SUBJECTS[subject])
    module = PlainModule(gpt.layers(shape, Grid(), seed=SEED))
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    vectors = [p for p in module.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=BETAS, eps=EPS, foreach=False)
    found: dict = {"loss": [], "norm": []}
    for step in range(STEPS):
        batch = training.batch_of(step, shape)
        loss = token_mean(module(batch.inputs(module.context)), batch, LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        found["norm"].append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step)
        optimizer.step()
        found["loss"].append(float(loss.detach()))
    held_out = training.batch_of(training.EVALUATION, shape)
    module.eval()
    with torch.no_grad():
        found["eval"] = [float(token_mean(module(held_out.ids), held_out, 0.0))]  # labels are not smoothed in an evaluation
    return found | {"weights": {name: p.detach() for name, p in module.named_parameters()}}


@pytest.mark.parametrize("subject", all_but_slow(SUBJECTS, set(SUBJECTS) - {"deep"}))
def test_one_rank_trains_as_torch_alone_does(subject: str) -> None:
    (alone,) = run_ranks(trained_by_torch_alone, 1, subject)
    assert_same(differences(run(subject, "one rank"), alone))


# Evaluation in between.


@pytest.mark.parametrize("layout", ["one rank", "PP2", pytest.param("ZeRO-3", marks=pytest.mark.slow)])
def test_evaluation_does_not_disturb_training(layout: str) -> None:
    world, settings = LAYOUTS[layout]
    between = run_ranks(training.call, world, dict(settings, steps=5, evaluate_every=1, weights=True))
    without = run_ranks(training.call, world, dict(settings, steps=5, weights=True))
    for a, b in zip(between, without, strict=True):
        assert a["loss"] == b["loss"] and a["norm"] == b["norm"] and a["eval"][-1] == b["eval"][-1]
        assert all(torch.equal(tensor, b["weights"][name]) for name, tensor in a["weights"].items())
        assert len(set(a["eval"])) == 5, "the model learns, so each evaluation is another number; the last is done twice"


# The comparison sees what it is to see.


def unmark_slices(engine: engines.Engine) -> None:
    """Slices that are not marked as such: their gradient is counted on tensor rank 0 alone."""
    for parameter in engine.parameters.values():
        if hasattr(parameter, "tensor_model_parallel"):
            del parameter.tensor_model_parallel


def mark_everything(engine: engines.Engine) -> None:
    """Replicated parameters marked as slices: their gradient is counted twice."""
    for parameter in engine.parameters.values():
        parameter.tensor_model_parallel = True


def shift_one_replica(engine: engines.Engine) -> None:
    """One tensor rank's copy of one replicated vector differs by a hundredth."""
    if engine.grid.tensor_rank == 1:
        with torch.no_grad():
            engine.parameters["blocks.0.attention_norm.weight"].mul_(1.01)


def forget_to_sum_norms(engine: engines.Engine) -> None:
    """A norm outside sliced regions keeps the gradient of this rank's positions."""
    engine.module.get_submodule("blocks.0.mlp_norm").partial_group = None


def begin_at_zero(engine: engines.Engine) -> None:
    """Every rank believes that its positions are the first ones."""
    engine.module.get_submodule("position").places.region = TensorParallelRegion(None)


def drop_as_if_whole(engine: engines.Engine) -> None:
    """The same in dropout alone: both ranks use the mask of the first positions."""
    engine.module.get_submodule("blocks.1.mlp_dropout").places.region = TensorParallelRegion(None)


def drop_as_rank_0(engine: engines.Engine) -> None:
    """Every rank uses the mask of rank 0's features."""
    engine.module.get_submodule("blocks.0.mlp").dropout.feature_rank = 0


def number_within_rank(batches: Iterable[MicroBatch], grid: Grid) -> Iterable[MicroBatch]:
    """Samples counted from zero in every micro-batch."""
    return [batch._replace(context={"samples": torch.arange(len(batch.ids))}) for batch in batches]


def mean_of_own_batch(batches: Iterable[MicroBatch], grid: Grid) -> Iterable[MicroBatch]:
    """Each data rank takes the mean over its *own* tokens, as a plain masked mean does."""
    own = list(batches)
    total = sum(float(weights.sum()) for _, (_, weights), _ in own)
    return [MicroBatch(ids, (targets, weights * len(own) / total), context) for ids, (targets, weights), context in own]


def equal_weights(batches: Iterable[MicroBatch], grid: Grid) -> Iterable[MicroBatch]:
    """Masked tokens are counted."""
    return [
        MicroBatch(ids, (targets, torch.full_like(weights, 1 / weights.numel())), context) for ids, (targets, weights), context in batches
    ]


@pytest.mark.parametrize(
    ("layout", "broken", "seen_in"),
    [
        ("TP2·SP", dict(spoil=forget_to_sum_norms), {"norm"}),
        ("TP2·SP", dict(spoil=begin_at_zero), {"loss", "norm"}),
        ("TP2·SP", dict(spoil=drop_as_if_whole, model=DROPPING), {"loss", "norm"}),
        pytest.param("TP2", dict(spoil=drop_as_rank_0, model=DROPPING), {"loss", "norm"}, marks=pytest.mark.slow),
        ("DP2", dict(reweigh=number_within_rank, model=DROPPING), {"loss", "norm"}),
        ("TP2", dict(spoil=unmark_slices), {"norm"}),
        pytest.param("TP2", dict(spoil=mark_everything), {"norm"}, marks=pytest.mark.slow),
        pytest.param("TP2", dict(spoil=shift_one_replica), {"loss", "norm"}, marks=pytest.mark.slow),
        pytest.param("TP2", dict(clip=0.0), {"loss"}, marks=pytest.mark.slow),
        ("DP2", dict(reweigh=mean_of_own_batch), {"loss", "norm"}),
        ("PP2", dict(reweigh=equal_weights), {"loss", "norm"}),
    ],
    ids=lambda value: (
        getattr(next(iter(value.values())), "__name__", str(value))
        if isinstance(value, dict)
        else "+".join(sorted(value))
        if isinstance(value, set)
        else value
    ),
)
def test_the_comparison_can_fail(layout: str, broken: dict, seen_in: set[str]) -> None:
    steps = 3
    world, settings = LAYOUTS[layout]
    subject = "dropping" if "model" in broken else "tied"
    expected = {key: run(subject, "one rank")[0][key][:steps] for key in ("loss", "norm")}
    found = run_ranks(training.call, world, dict(settings, steps=steps, **broken))
    errors = {key: max(furthest(rank[key], expected[key]) for rank in found) for key in expected}
    with pytest.raises(AssertionError):
        assert_same(errors)
    assert all(errors[key] > 2 * {"loss": LOSS, "norm": NORM}[key] for key in seen_in), errors


# Refusals.


class Accelerator:
    def __init__(self, fp16: bool) -> None:
        self.fp16 = fp16

    def is_fp16_supported(self) -> bool:
        return self.fp16


@pytest.mark.parametrize(("precision", "has_kernels", "refused"), [("fp16", False, True), ("fp16", True, False), ("bf16", False, False)])
def test_fp16_needs_a_device_that_has_it(precision: str, has_kernels: bool, refused: bool, monkeypatch) -> None:
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: Accelerator(has_kernels))
    if not refused:
        return engines.refuse_precision(precision)
    with pytest.raises(Mistake, match="precision = 'fp16' needs fp16 kernels.*→ use 'bf16' or 'fp32'"):
        engines.refuse_precision(precision)
    return None


def test_more_stages_than_blocks_is_refused_on_every_rank() -> None:
    with pytest.raises(RankFailed, match="parallel.pipe = 2 is more than the 1 blocks of the model") as failure:
        run_ranks(training.call, 2, dict(pipe=2, model={"num_layers": 1}))
    assert all(f"--- rank {rank} ---" in str(failure.value) for rank in (0, 1))


def decay_groups() -> list[tuple[list[tuple[int, ...]], float]]:
    engine, *_ = training.build(zero_stage=3)
    groups = engines._decay_groups(engine.parameters.values(), engine.settings)
    return [([slice_of(parameter).shape for parameter in group["params"]], group["weight_decay"]) for group in groups]


def test_matrices_decay_and_vectors_do_not_even_where_zero_three_emptied_them() -> None:
    (matrices, decay), (vectors, none) = run_ranks(decay_groups, 1)[0]
    assert (decay, none) == (WEIGHT_DECAY, 0.0)
    assert {len(shape) for shape in matrices} == {2} and {len(shape) for shape in vectors} == {1}


def told(pipe: int, tensor: int) -> list[list[float]]:
    """Everybody's copy of what last stages saw: ten times their data rank, in bf16."""
    grid = make_grid(pipe, tensor)
    assert grid.world == dist.get_world_size()
    seen = torch.full((2,), 10.0 * grid.data_rank + 1, dtype=torch.bfloat16) if grid.is_last_stage else None
    found = gather_from_last_stages(seen, (2,), grid, torch.device("cpu"))
    assert found.dtype == torch.float32
    return found.tolist()


@pytest.mark.parametrize(("world", "pipe", "tensor"), [(4, 2, 1), (4, 1, 2), (2, 2, 1), (1, 1, 1)])
def test_every_rank_is_told_what_each_data_rank_saw(world: int, pipe: int, tensor: int) -> None:
    data = world // pipe // tensor
    assert run_ranks(told, world, pipe, tensor) == [[[10.0 * rank + 1] * 2 for rank in range(data)]] * world


def test_a_shape_that_was_not_announced_is_named() -> None:
    with pytest.raises(ValueError, match=r"has the shape \(3,\), \(2,\) was announced"):
        gather_from_last_stages(torch.zeros(3), (2,), Grid(), torch.device("cpu"))


def test_the_loss_function_is_back_whatever_happens() -> None:
    pipeline, kept = SimpleNamespace(loss_fn="the loss"), LogitsHook(lambda logits: logits + 1)
    with pytest.raises(KeyError), instead_of_loss(pipeline, kept):
        assert pipeline.loss_fn is kept and float(kept(torch.zeros(2), None)) == 0.0
        raise KeyError
    assert pipeline.loss_fn == "the loss" and kept.result.tolist() == [1.0, 1.0]
