"""fp16 on the CPU, with DeepSpeed's capability check disabled: overflow, back-off and growth are the same sequence on every layout."""

import functools
import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from models import gpt
from models.config import GPT
from parallel.engines.engine import Engine
from parallel.engines.micro_batch import MicroBatch
from parallel.grid import Grid
from parallel.layers import PlainModule
from tests.harness import run_ranks
from tests.models.helpers.build import fill, worst
from tests.parallel.helpers import training
from tests.parallel.helpers.checkpoints import all_but_slow
from tests.parallel.helpers.training import BATCH, LABEL_SMOOTHING, MODEL, SEED, STEPS

OVERFLOWS, NEVER = 24, 8
"""Powers of two to begin at: five steps are skipped before the first update, or none at all."""
WINDOW, NO_GROWTH = 3, 1000
"""Steps without overflow after which the scale may double: soon, or not in this test."""
LARGEST = torch.finfo(torch.float16).max
LOSS, NORM = 1e-3, 5e-3
"""Relative errors that are allowed; measured: 5.3e-5 and 1.4e-3."""
MICRO = 2
"""The same everywhere: a micro-batch's weight gradients are summed in fp16, so its size decides when a sum is too large."""

SUBJECT = dict(num_layers=2)
LAYOUTS = {
    "one rank": (1, {}),
    "TP2": (2, dict(tensor=2)),
    "TP2·SP": (2, dict(tensor=2, sequence=True)),
    "PP2": (2, dict(pipe=2)),
    "DP2": (2, {}),
    "ZeRO-2": (2, dict(zero_stage=2)),
    "ZeRO-3": (2, dict(zero_stage=3)),
    "TP2·PP2": (4, dict(tensor=2, pipe=2)),
    "DP4": (4, {}),
    "TP4·SP": (4, dict(tensor=4, sequence=True)),
    "PP2·DP2": (4, dict(pipe=2)),
    "TP2·DP2·SP·ZeRO-3": (4, dict(tensor=2, sequence=True, zero_stage=3)),
    "ZeRO-2, optimizer offloaded": (2, dict(zero_stage=2, offload_optimizer=True)),
    "ZeRO-3, all offloaded": (2, dict(zero_stage=3, offload_optimizer=True, offload_parameters=True)),
}
EACH = [(layout, OVERFLOWS) for layout in ("TP2", "PP2", "DP2", "ZeRO-2", "ZeRO-3", "TP2·PP2")]
EACH += [(layout, NEVER) for layout in ("PP2", "DP2", "ZeRO-3")]
QUICK = {("TP2·PP2", OVERFLOWS)}
BEYOND = [(layout, power) for layout in LAYOUTS for power in (OVERFLOWS, NEVER) if layout != "one rank" and (layout, power) not in EACH]


def table(power: int, window: int = WINDOW) -> dict:
    """What an experiment writes into `deepspeed={…}`."""
    return {"fp16": {"initial_scale_power": power, "loss_scale_window": window, "hysteresis": 1}}


def settings(layout: str, power: int, window: int = WINDOW, **changes) -> dict:
    """For `training.train`, but for the number of ranks."""
    return {**LAYOUTS[layout][1], "model": SUBJECT, "precision": "fp16", "micro": MICRO, "explicit": table(power, window), **changes}


@functools.cache
def run(layout: str, power: int) -> list[dict]:
    """What every rank saw. Run once, shared by the tests of this file."""
    return run_ranks(training.call, LAYOUTS[layout][0], settings(layout, power))


def skips(found: dict) -> list[bool]:
    """Whether each step was skipped."""
    return [after > before for before, after in zip([0, *found["skipped"]], found["skipped"], strict=False)]


def scaling(found: dict) -> list[tuple[float, bool]]:
    """(loss scale, skipped) of each step."""
    return list(zip(found["scale"], skips(found), strict=True))


def furthest(found: list[float], expected: list[float]) -> float:
    """The largest relative error; infinite numbers stand in the same places."""
    assert [math.isfinite(a) for a in found] == [math.isfinite(b) for b in expected]
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True) if math.isfinite(b))


def assert_same_run(layout: str, power: int) -> None:
    (alone,) = run("one rank", power)
    for found in run(layout, power):
        assert scaling(found) == scaling(alone)
        assert furthest(found["loss"], alone["loss"]) <= LOSS
        assert furthest(found["eval"], alone["eval"]) <= LOSS
        assert furthest(found["norm"], alone["norm"]) <= NORM


@pytest.mark.parametrize(("layout", "power"), all_but_slow(EACH, QUICK))
def test_every_layout_overflows_backs_off_and_grows_as_one_rank_does(layout: str, power: int) -> None:
    """PP2's norm: DeepSpeed alone leaves the tied copies' gradients apart, 4 % of it."""
    assert_same_run(layout, power)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "power"), BEYOND)
def test_so_do_combined_and_offloaded_ones(layout: str, power: int) -> None:
    assert_same_run(layout, power)


@pytest.mark.parametrize(("power", "least", "most", "growths"), [(OVERFLOWS, 7, 12, 2), (NEVER, 0, 0, 6)])
def test_the_scale_follows_its_rule(power: int, least: int, most: int, growths: int) -> None:
    """Halved by a skipped step, doubled by one that follows a multiple of WINDOW others in a row, none of them skipped."""
    (alone,) = run("one rank", power)
    scale, clean, rule, grown = 2.0**power, 0, [], 0
    for skipped in skips(alone):
        rule.append(scale)
        grows = not skipped and clean > 0 and clean % WINDOW == 0
        scale, grown, clean = scale * (0.5 if skipped else 2 if grows else 1), grown + grows, 0 if skipped else clean + 1
    assert alone["scale"] == rule
    assert least <= sum(skips(alone)) <= most and grown >= growths


# One rank against fp64.


def largest_gradients(module: nn.Module, model: GPT, step: int) -> float:
    """The largest number that the backward pass of any micro-batch meets in a parameter's or a layer's gradient, unscaled."""
    met = [0.0]

    def meet(gradient: Tensor) -> None:
        met.append(float(gradient.abs().max()))

    layers = [layer for layer in module.modules() if layer is not module and not list(layer.children())]
    handles = [layer.register_forward_hook(lambda layer, _, y: y.register_hook(meet) and None) for layer in layers]
    for batch in training.micro_batches(step, model, Grid(), MICRO):
        module.zero_grad()
        weights = batch.labels[1].double() / (BATCH // MICRO)  # of the step's mean: the engine divides by the number of micro-batches
        gpt.TokenLoss(model.vocab_size, LABEL_SMOOTHING, None)(module(batch.inputs(module.context)), (batch.labels[0], weights)).backward()
        for parameter in module.parameters():
            meet(parameter.grad)
    for handle in handles:
        handle.remove()
    return max(met)


def scaled_and_skipped(power: int) -> list[tuple[float, bool]]:
    """(the largest gradient in fp64, times the loss scale, over fp16's largest number; skipped) of each step on one rank."""
    engine, model, grid = training.build(**settings("one rank", power))
    module = PlainModule(gpt.layers(model, grid, SEED)).double()
    found = []
    for step in range(STEPS):
        fill(module, dict(engine.full_weights()))
        ratio, before = largest_gradients(module, model, step) * engine.loss_scale / LARGEST, engine.skipped_steps
        engine.train_batch(training.micro_batches(step, model, grid, MICRO), training.learning_rate(step))
        found.append((ratio, engine.skipped_steps > before))
    return found


def test_a_step_is_skipped_where_a_scaled_gradient_is_larger_than_fp16_s_numbers() -> None:
    """So nothing but the loss scale multiplies a token's gradient. No step is nearer than 5 % to the edge, where rounding would decide."""
    (found,) = run_ranks(scaled_and_skipped, 1, OVERFLOWS)
    assert [ratio > 1 for ratio, _ in found] == [skipped for _, skipped in found]
    assert all(abs(math.log(ratio)) > 0.05 for ratio, _ in found), found


# A skipped step leaves nothing behind.


class NotFiniteAtStep:
    """Weights of one step's micro-batches are not numbers, and so nothing of that step is."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __call__(self, batches: Iterable[MicroBatch], grid: Grid) -> list[MicroBatch]:
        self.left -= 1
        factor = math.nan if self.left == -1 else 1.0
        return [MicroBatch(ids, (targets, weights * factor), context) for ids, (targets, weights), context in batches]


@functools.cache
def run_with_a_bad_step(layout: str, precision: str) -> list[dict]:
    """Six steps, the third is not finite."""
    one = {**LAYOUTS[layout][1], "model": SUBJECT, "precision": precision, "micro": MICRO, "steps": 6, "reweigh": NotFiniteAtStep(2)}
    return run_ranks(training.call, LAYOUTS[layout][0], one)


BAD = [("PP2", "bf16"), ("ZeRO-2, optimizer offloaded", "bf16"), ("ZeRO-2, optimizer offloaded", "fp16")]


@pytest.mark.parametrize(("layout", "precision"), BAD)
def test_a_step_that_is_not_finite_is_skipped_alone(layout: str, precision: str) -> None:
    """DeepSpeed's ZeRO-2 with an offloaded optimizer would skip every step after it."""
    (alone,) = run_with_a_bad_step("one rank", precision)
    assert alone["skipped"] == [0, 0, 1, 1, 1, 1]
    for found in run_with_a_bad_step(layout, precision):
        assert found["skipped"] == alone["skipped"]
        assert furthest(found["loss"], alone["loss"]) <= LOSS


# What the scale must not change.


def watched(layout: dict) -> tuple[dict[str, Tensor], float]:
    """(gradients, norm) of a first step."""
    engine, model, grid = training.build(**layout)
    seen: dict[str, Tensor] = {}
    engine.watch_gradients(seen.update)
    engine.train_batch(training.micro_batches(0, model, grid, MICRO), 0.0)
    return seen, engine.gradient_norm()


@pytest.mark.parametrize("layout", all_but_slow(["one rank", "PP2", "DP2", "ZeRO-3"], ["PP2", "ZeRO-3"]))
def test_watched_gradients_are_unscaled(layout: str) -> None:
    """Against fp32 on one rank; fp16 keeps 3 digits."""
    ((true, norm),) = run_ranks(watched, 1, dict(model=SUBJECT, micro=MICRO))
    ranks = run_ranks(watched, LAYOUTS[layout][0], settings(layout, NEVER))
    joined = {name: gradient for gradients, _ in ranks for name, gradient in gradients.items()}
    assert worst(joined, true)[0] <= 1e-2
    assert all(found == pytest.approx(norm, rel=1e-3) for _, found in ranks)


@functools.cache
def unclipped(layout: str, window: int, spoil: Callable | None = None) -> dict:
    """Rank 0's run from a scale that never overflows, without clipping."""
    return run_ranks(training.call, LAYOUTS[layout][0], settings(layout, NEVER, window, clip=0.0, spoil=spoil))[0]


@pytest.mark.parametrize("layout", ["one rank", pytest.param("ZeRO-3", marks=pytest.mark.slow)])
def test_a_growing_scale_changes_neither_norms_nor_updates(layout: str) -> None:
    """Nothing clipped, which would hide it: against a scale that stays."""
    grown, stays = unclipped(layout, WINDOW), unclipped(layout, NO_GROWTH)
    assert grown["scale"][-1] >= 2**6 * stays["scale"][-1] == 2 ** (6 + NEVER)
    assert furthest(grown["loss"], stays["loss"]) <= 2e-4
    assert furthest(grown["norm"], stays["norm"]) <= NORM


# The comparison sees what it is to see.


def multiply_by_data_ranks(engine: Engine) -> None:
    """The scale is DeepSpeed's own: a data rank's loss is multiplied by it and by the number of data ranks."""
    engine.optimizer.loss_scaler.cur_scale *= engine.grid.data


def change_within_the_step(engine: Engine) -> None:
    """As in DeepSpeed: gradients are divided by the next step's scale."""
    del engine.optimizer.step, engine.optimizer._update_scale


def test_a_factor_before_the_backward_pass_is_seen() -> None:
    """DP2 overflows one power earlier: 2 % of the loss within 20 steps."""
    (alone,), found = run("one rank", OVERFLOWS), run_ranks(training.call, 2, settings("DP2", OVERFLOWS, spoil=multiply_by_data_ranks))[0]
    assert skips(found) != skips(alone)
    assert furthest(found["loss"], alone["loss"]) > 5 * LOSS


def test_a_scale_that_changes_within_a_step_is_seen() -> None:
    broken, whole = unclipped("one rank", WINDOW, change_within_the_step), unclipped("one rank", NO_GROWTH)
    assert furthest(broken["loss"], whole["loss"]) > 5 * LOSS
    assert furthest(broken["norm"], whole["norm"]) > 5 * NORM


def test_the_model_is_tied_and_learns() -> None:
    (alone,) = run("one rank", NEVER)
    assert MODEL["tied"] and alone["loss"][-1] < alone["loss"][0] - 0.2


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(dict(), id="DP2", marks=pytest.mark.slow),
        pytest.param(dict(tensor=2), id="TP2"),
        pytest.param(dict(zero_stage=3), id="ZeRO-3", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_takes_the_scale_to_another_layout(tmp_path, layout: dict) -> None:
    """The scale that the next step would have had, and its losses, whatever number of data ranks goes on."""
    settings = dict(precision="fp16", micro=2, steps=14, explicit={"fp16": {"initial_scale_power": 24, "loss_scale_window": 3}})
    (alone,) = run_ranks(training.call, 1, settings | dict(save={10: str(tmp_path / "step_10")}))
    for found in run_ranks(training.call, 2, settings | layout | dict(resume=str(tmp_path / "step_10"))):
        assert found["scale"] == alone["scale"][10:] and found["skipped"] == alone["skipped"][10:]
        assert found["loss"] == pytest.approx(alone["loss"][10:], rel=1e-3)
