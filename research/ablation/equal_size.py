"""Resizes a variant to as many parameters or FLOPs as the baseline has, so that a comparison is not one of sizes. Imports no torch."""

from typing import NamedTuple

from models.encoder_config import AnyModel
from models.estimates.flops import training_flops
from models.estimates.parameters import parameters
from parallel.errors import Mistake
from research.ablation.sides import Side
from research.tracking import format as fmt

SIZES = {"params": (parameters, "parameters"), "flops": (training_flops, "FLOPs per token")}
"""What can be made equal: how it is computed, and its unit."""
MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""ffn_size is a multiple of the first of these that is exact enough: matrices of round sizes are faster, and more tensor degrees fit."""
TOLERANCE = 0.005
"""Relative difference of the sizes."""


class Resized(NamedTuple):
    """A model's ffn_size now and as it is proposed, its parameters or FLOPs with it, and those of the baseline."""

    now: int
    ffn_size: int
    size: int
    target: int


def with_equal_size(model: AnyModel, baseline: AnyModel, what: str) -> Resized | None:
    """The ffn_size with which `model` is as large as `baseline` in `what`, a key of SIZES. None if no formula counts one of them, or if
    none fits. Parameters and FLOPs are linear in ffn_size."""
    count, _ = SIZES[what]
    target, size = count(baseline), count(model)
    if target is None or size is None:
        return None
    slope = (count(model.model_copy(update={"ffn_size": model.ffn_size + 1})) or 0) - size
    exact = model.ffn_size + (target - size) / slope
    for multiple in MULTIPLES:
        ffn_size = multiple * round(exact / multiple)
        found = size + slope * (ffn_size - model.ffn_size)
        if ffn_size > 0 and abs(found - target) <= TOLERANCE * target:
            return Resized(model.ffn_size, ffn_size, found, target)
    return None


def proposal(baseline: Side, side: Side, what: str) -> str:
    """'gpt_swiglu with --model.ffn_size 512 (now 768) has 3,378,304 parameters, +0.03 % beside the 3,377,280 of gpt_sotu'."""
    resized = with_equal_size(side.first.experiment.model, baseline.first.experiment.model, what)
    _, unit = SIZES[what]
    if resized is None:
        raise Mistake(
            f"--iso {what}: no model.ffn_size gives {side.label} as many {unit} as {baseline.label}, or a class of variant.py has no "
            "formula → change another size, such as model.num_layers"
        )
    percent = 100 * (resized.size - resized.target) / resized.target
    shown, target = (f"{size:,}" if what == "params" else fmt.flops(size) for size in (resized.size, resized.target))
    size = f"{shown} {unit}, {percent:+.2f} % beside the {target} of {baseline.label}"
    if resized.ffn_size == resized.now:
        return f"{side.label} has {size}: no other model.ffn_size is needed"
    return f"{side.label} with --model.ffn_size {resized.ffn_size} (now {resized.now}) has {size}"
