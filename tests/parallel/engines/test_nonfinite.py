"""On real engines, only the rank that produced a NaN reports it, although all ranks have it after the reduction."""

import math

import pytest
import torch
from torch import nn

from parallel.engines.nonfinite import NonFiniteGradients
from tests.harness import run_ranks
from tests.parallel.helpers import training

NAME = "blocks.0.mlp.down.weight"


def spoiled(layout: dict) -> tuple[list[str], list[str], float]:
    """(suspects of a step in which rank 1's gradient of NAME is NaN, those of the next, the norm that all saw)."""
    engine, shape, grid = training.build(**layout)
    bad = [grid.rank == 1]
    if NAME in engine.parameters:
        engine.parameters[NAME].register_hook(lambda gradient: gradient * math.nan if bad[0] else gradient)
    suspects = NonFiniteGradients(engine.parameters)
    found, norms = [], []
    for step in range(2):
        suspects.clear()
        engine.train_batch(training.micro_batches(step, shape, grid, engine.settings.micro_batch_size), 1e-3)
        found.append(suspects.found())
        norms.append(engine.gradient_norm())
        bad[0] = False
    return found[0], found[1], norms[0]


@pytest.mark.parametrize(
    "layout", [dict(micro=2), dict(micro=2, zero_stage=3), dict(tensor=2, precision="bf16")], ids=["DP2", "ZeRO-3", "TP2 bf16"]
)
def test_only_the_rank_that_made_it_is_suspected(layout: dict) -> None:
    for rank, (first, second, norm) in enumerate(run_ranks(spoiled, 2, layout)):
        assert first == ([NAME] if rank == 1 else [])
        assert second == []
        assert not math.isfinite(norm)


def test_infinities_and_nan_do_not_cancel_and_large_half_numbers_are_no_suspects() -> None:
    parameters = {name: nn.Parameter(torch.zeros(4, dtype=torch.float16)) for name in ("plus and minus", "one", "large")}
    suspects = NonFiniteGradients(parameters)
    gradients = [[math.inf, -math.inf, 0, 0], [0, math.nan, 0, 0], [6e4, 6e4, 6e4, 6e4]]
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        (parameter * torch.tensor(gradient, dtype=torch.float16)).sum().backward()
    assert suspects.found() == ["plus and minus", "one"]
