"""Resizes a variant to as many parameters as the baseline has, so that a comparison is not one of sizes. Imports no torch."""

from typing import NamedTuple

from models.config import GPT
from models.estimates.parameters import parameters
from parallel.errors import Mistake
from research.ablation.sides import Side

MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""ffn_size is a multiple of the first of these that is exact enough: matrices of round sizes are faster, and more tensor degrees fit."""
TOLERANCE = 0.005
"""Relative difference of the parameters."""


class Resized(NamedTuple):
    """A model's ffn_size now and as it is proposed, and the parameters with it."""

    now: int
    ffn_size: int
    parameters: int
    target: int


def with_equal_parameters(model: GPT, baseline: GPT) -> Resized | None:
    """The ffn_size with which `model` has as many parameters as `baseline`; None if a formula counts one of them not, or none fits.

    The count is linear in ffn_size.
    """
    target, count = parameters(baseline), parameters(model)
    if target is None or count is None:
        return None
    slope = (parameters(model.model_copy(update={"ffn_size": model.ffn_size + 1})) or 0) - count
    exact = model.ffn_size + (target - count) / slope
    for multiple in MULTIPLES:
        size = multiple * round(exact / multiple)
        found = count + slope * (size - model.ffn_size)
        if size > 0 and abs(found - target) <= TOLERANCE * target:
            return Resized(model.ffn_size, size, found, target)
    return None


def proposal(baseline: Side, side: Side) -> str:
    """'gpt_swiglu: --model.ffn_size 512 (now 768) makes 3,378,304 parameters, +0.03 % of the 3,377,280 of gpt_sotu'."""
    resized = with_equal_parameters(side.first.experiment.model, baseline.first.experiment.model)
    if resized is None:
        raise Mistake(
            f"--iso params: no model.ffn_size gives {side.label} as many parameters as {baseline.label}, or a class of variant.py has no "
            "formula → change another size, such as model.num_layers"
        )
    percent = 100 * (resized.parameters - resized.target) / resized.target
    size = f"{resized.parameters:,} parameters, {percent:+.2f} % beside the {resized.target:,} of {baseline.label}"
    if resized.ffn_size == resized.now:
        return f"{side.label} has {size}: no other model.ffn_size is needed"
    return f"{side.label} with --model.ffn_size {resized.ffn_size} (now {resized.now}) has {size}"
