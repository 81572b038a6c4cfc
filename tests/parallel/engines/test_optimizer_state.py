"""An engine's state equals Adam's definition, and is the same after reading and setting it, on every ZeRO stage."""

import functools
import math

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from parallel.distributed import PRECISIONS
from parallel.engines.engine import Engine
from parallel.engines.optimizer_state import MOMENTS, check_counters, counters, ensure_moments, fragment, publish_weights, set_counters
from parallel.errors import Mistake
from parallel.slices import slice_of
from tests.harness import run_ranks
from tests.parallel.helpers import training
from tests.parallel.helpers.checkpoints import all_but_slow
from tests.parallel.helpers.training import BETAS, CLIP

SMALL = {"num_layers": 2}
KINDS = ("weights", *MOMENTS)
LAYOUTS = {
    "one rank": (1, {}),
    "DP2": (2, dict(micro=2)),
    "DP2, bf16": (2, dict(micro=2, precision="bf16")),
    "ZeRO-2, fp16": (2, dict(micro=2, zero_stage=2, precision="fp16")),
    "ZeRO-2, offloaded": (2, dict(micro=2, zero_stage=2, offload_optimizer=True)),
    "ZeRO-3": (2, dict(micro=2, zero_stage=3)),
    "ZeRO-3, bf16, offloaded": (2, dict(micro=2, zero_stage=3, precision="bf16", offload_optimizer=True, offload_parameters=True)),
    "PP2, bf16": (2, dict(pipe=2, precision="bf16")),
    "ZeRO-3 on three": (3, dict(micro=2, zero_stage=3)),  # which divide no parameter's size
}


def step_once(engine: Engine, shape, grid) -> None:
    engine.train_batch(training.micro_batches(0, shape, grid, engine.settings.micro_batch_size), training.learning_rate(0))


def whole_in_the_model(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What the model computes with."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().clone()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def out(settings: dict) -> dict:
    """After one step: every rank's fragments, the whole of each as DeepSpeed puts it together, and the gradients as it saw them."""
    engine, shape, grid = training.build(model=SMALL, **settings)
    gradients: dict[str, torch.Tensor] = {}
    engine.watch_gradients(gradients.update)
    step_once(engine, shape, grid)
    ensure_moments(engine)
    found: dict = {"norm": engine.gradient_norm(), "gradients": gradients, "fragments": {}, "wholes": {}, "model": {}}
    for name, parameter in engine.parameters.items():
        for kind in KINDS:
            own = fragment(parameter, kind)
            found["fragments"][kind, name] = (own.start, own.values.clone())
            get = safe_get_full_fp32_param if kind == "weights" else safe_get_full_optimizer_state
            found["wholes"][kind, name] = get(parameter, *([kind] if kind != "weights" else [])).flatten().clone()
        found["model"][name] = whole_in_the_model(parameter)
    return found


EACH = all_but_slow(LAYOUTS, {"DP2, bf16", "ZeRO-2, offloaded", "ZeRO-3 on three", "PP2, bf16"})


@functools.cache
def after_one_step(layout: str) -> list[dict]:
    """Run once, shared by three tests."""
    world, settings = LAYOUTS[layout]
    return run_ranks(out, world, settings)


@pytest.mark.parametrize("layout", EACH)
def test_fragments_are_the_parts_of_what_deepspeed_puts_together(layout: str) -> None:
    ranks, settings = after_one_step(layout), LAYOUTS[layout][1]
    together = [ranks] if settings.get("pipe", 1) == 1 else [[rank] for rank in ranks]  # a stage has parameters of its own
    for group in together:
        for key, whole in group[0]["wholes"].items():
            covered = torch.zeros(len(whole), dtype=torch.int)
            for rank in group:
                start, values = rank["fragments"][key]
                assert torch.equal(values, whole[start : start + len(values)]), key
                covered[start : start + len(values)] += 1
            assert (covered == 1).all(), f"{key}: an element is on no rank, or on two"


@pytest.mark.parametrize("layout", EACH)
def test_moments_after_one_step_are_adams_of_the_clipped_gradient(layout: str) -> None:
    """exp_avg = (1 − β₁) g and exp_avg_sq = (1 − β₂) g², g the gradient by its own hook, scaled down to the clip."""
    for rank in after_one_step(layout):
        assert rank["norm"] > CLIP
        for name, gradient in rank["gradients"].items():
            g = gradient.double().flatten() * CLIP / (rank["norm"] + 1e-6)
            expected = {"exp_avg": (1 - BETAS[0]) * g, "exp_avg_sq": (1 - BETAS[1]) * g**2}
            for kind, value in expected.items():
                found = rank["wholes"][kind, name].double()
                assert float((found - value).norm()) <= 1e-5 * float(value.norm()) + 1e-12, (kind, name)


@pytest.mark.parametrize("layout", EACH)
def test_the_model_computes_with_the_rounded_weights(layout: str) -> None:
    dtype = PRECISIONS[LAYOUTS[layout][1].get("precision", "fp32")]
    for rank in after_one_step(layout):
        for name, weight in rank["model"].items():
            assert weight.dtype == dtype and torch.equal(weight.flatten(), rank["wholes"]["weights", name].to(dtype)), name


def back_in(settings: dict) -> list[tuple[str, str]]:
    """Sets every number to one of its own, on an engine that has not stepped; returns what did not arrive."""
    engine, shape, grid = training.build(model=SMALL, **settings)
    ensure_moments(engine)
    for i, kind in enumerate(KINDS):
        for name, parameter in engine.parameters.items():
            own = fragment(parameter, kind)
            own.values.copy_(-0.0 if name.endswith("bias") else torch.arange(own.start, own.start + own.values.numel()) / 7 + i)
    publish_weights(engine)
    lost = []
    for name, parameter in engine.parameters.items():
        count = math.prod(slice_of(parameter).local_shape(grid.tensor))
        expected = torch.full((count,), -0.0) if name.endswith("bias") else torch.arange(count) / 7
        found = whole_in_the_model(parameter).flatten()
        lost += [("model", name)] if found.numpy(force=True).tobytes() != expected.to(found.dtype).numpy().tobytes() else []
    return lost


@pytest.mark.parametrize("layout", all_but_slow([layout for layout in LAYOUTS if "bf16" not in layout], {"DP2", "ZeRO-3 on three"}))
def test_what_goes_in_before_the_first_step_is_what_the_model_computes_with(layout: str) -> None:
    """Bit for bit: a sign of zero too."""
    world, settings = LAYOUTS[layout]
    assert run_ranks(back_in, world, settings) == [[]] * world


def without_a_step(settings: dict) -> tuple[list[float], list[float]]:
    """One step with the state made beforehand, and one as DeepSpeed makes it."""
    found = []
    for beforehand in (False, True):
        engine, shape, grid = training.build(model=SMALL, **settings)
        if beforehand:
            ensure_moments(engine)
        step_once(engine, shape, grid)
        ensure_moments(engine)
        found.append([float(fragment(p, kind).values.double().sum()) for p in engine.parameters.values() for kind in KINDS])
    return found[0], found[1]


@pytest.mark.parametrize("layout", ["one rank", "DP2, bf16", "ZeRO-3"])
def test_moments_made_beforehand_change_nothing(layout: str) -> None:
    world, settings = LAYOUTS[layout]
    for made_by_the_step, made_beforehand in run_ranks(without_a_step, world, settings):
        assert made_by_the_step == made_beforehand and sum(map(abs, made_beforehand)) > 0


# Counters.


SCALED = {"fp16": {"initial_scale_power": 24, "loss_scale_window": 2}}


BESIDE = ("global_steps", "skipped_steps", "micro_steps", "global_samples")


def counted(settings: dict) -> tuple[dict, dict, dict, dict]:
    """After twelve steps; in a fresh engine in which that is set; and what DeepSpeed counts in both."""
    engine, shape, grid = training.build(model=SMALL, **settings)
    for step in range(12):
        engine.train_batch(training.micro_batches(step, shape, grid, engine.settings.micro_batch_size), training.learning_rate(step))
    fresh, *_ = training.build(model=SMALL, **settings)
    ensure_moments(engine), ensure_moments(fresh)
    set_counters(fresh, counters(engine))
    return counters(engine), counters(fresh), *({name: getattr(e.deepspeed, name) for name in BESIDE} for e in (engine, fresh))


@pytest.mark.parametrize("layout", [(1, {}), (2, dict(pipe=2)), (2, dict(zero_stage=3))], ids=str)
def test_skipped_steps_and_the_loss_scale_are_counted_and_set(layout: tuple[int, dict]) -> None:
    world, settings = layout
    for before, after, below, below_after in run_ranks(counted, world, dict(settings, precision="fp16", explicit=SCALED)):
        assert after == before and before["steps"] == 12 and below_after == below
        assert before["skipped_steps"] > 2 and before["adam_steps"] == 12 - before["skipped_steps"] > 2
        assert before["loss_scaler"]["cur_iter"] == 12 and before["loss_scaler"]["cur_scale"] < 2**24


class ForgetfulNAdam(torch.optim.NAdam):
    """Does not name mu_product, the product of the momenta so far."""

    state_names = MOMENTS


def refused_after_a_step(settings: dict) -> str:
    """What ensure_moments says on this rank."""
    engine, shape, grid = training.build(model=SMALL, optimizer_class=ForgetfulNAdam, **settings)
    step_once(engine, shape, grid)
    with pytest.raises(Mistake) as caught:
        ensure_moments(engine)
    return str(caught.value)


def test_state_that_the_class_does_not_name_is_refused_on_every_rank() -> None:
    said = "ForgetfulNAdam keeps exp_avg, exp_avg_sq and mu_product per parameter, but says exp_avg and exp_avg_sq → let state_names name"
    assert all(said in sentence for sentence in run_ranks(refused_after_a_step, 2, dict(micro=2)))


GOOD = {"steps": 3, "skipped_steps": 0, "adam_steps": 3, "loss_scaler": {}}
SCALER = {"cur_scale": 4.0, "cur_iter": 3, "last_overflow_iter": -1, "cur_hysteresis": 1}
STRANGE = [None, [], {}, GOOD | {"steps": -1}, GOOD | {"adam_steps": 2.5}, GOOD | {"skipped_steps": True}, GOOD | {"steps": 10**12}]
STRANGE += [GOOD | {"loss_scaler": SCALER | change} for change in ({"cur_scale": 0}, {"cur_scale": "4"}, {"cur_iter": None}, {"x": 1})]
STRANGE += [GOOD | {"loss_scaler": value} for value in ("x", None, [1], {"cur_scale": float("inf")}, {"cur_scale": 4.0})]


@pytest.mark.parametrize("found", STRANGE, ids=str)
def test_counters_of_a_stranger_are_refused(found) -> None:
    with pytest.raises(Mistake, match="the checkpoint's (counters hold no|loss scale is 0).* → use another checkpoint of the run"):
        check_counters(found)


@pytest.mark.parametrize("found", [GOOD, GOOD | {"loss_scaler": SCALER}], ids=str)
def test_honest_counters_are_taken(found) -> None:
    assert check_counters(found) == found
