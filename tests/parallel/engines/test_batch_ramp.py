"""Steps with a growing number of micro-batches: each engine's losses and gradient norms beside plain torch on whole batches."""

import pytest
import torch

from models import gpt
from models.config import GPT
from parallel.engines.micro_batch import MicroBatch
from parallel.grid import Grid
from parallel.layers import PlainModule
from tests.harness import run_ranks
from tests.parallel.helpers import training
from tests.parallel.helpers.training import BATCH, BETAS, CLIP, EPS, LABEL_SMOOTHING, MODEL, SEED, WEIGHT_DECAY

SIZES = [2, 2, 2, 4, 6, 6, BATCH, BATCH, 4]
"""Sequences of each step. It falls once, too, and a step's number of micro-batches does not divide that of all before it."""
LOSS, NORM = 2e-5, 1e-5
"""Relative errors that are allowed."""
LAYOUTS = {
    "one rank": (1, {}),
    "PP2": (2, {"pipe": 2}),
    "ZeRO-3": (2, {"zero_stage": 3}),
    "DP2": (2, {}),
    "ZeRO-2": (2, {"zero_stage": 2}),
    "ZeRO-2, optimizer offloaded": (2, {"zero_stage": 2, "offload_optimizer": True}),
    "PP2·DP2": (4, {"pipe": 2}),
    "DP2, bf16": (2, {"precision": "bf16"}),
}
QUICK = {"PP2"}


def beginning(step: int, shape: GPT) -> MicroBatch:
    """The first SIZES[step] sequences of the step's batch, weighted for the mean over their unmasked tokens."""
    ids, (targets, weights), context = training.batch_of(step, shape)
    size = SIZES[step]
    mask = (weights[:size] > 0).float()
    return MicroBatch(ids[:size], (targets[:size], mask / mask.sum()), {name: tensor[:size] for name, tensor in context.items()})


def on_engine(layout: dict) -> dict[str, list[float]]:
    """Micro-batches of one sequence."""
    engine, shape, grid = training.build(micro=1, **layout)
    found: dict[str, list[float]] = {"loss": [], "norm": []}
    for step, size in enumerate(SIZES):
        ids, (targets, weights), context = beginning(step, shape)
        share = size // grid.data
        rows = range(grid.data_rank * share, (grid.data_rank + 1) * share)
        batches = [
            MicroBatch(ids[i : i + 1], (targets[i : i + 1], weights[i : i + 1] * size), {name: t[i : i + 1] for name, t in context.items()})
            for i in rows
        ]
        found["loss"].append(engine.train_batch(batches, training.learning_rate(step), share))
        found["norm"].append(engine.gradient_norm())
    return found


def in_torch() -> dict[str, list[float]]:
    """The plain module, AdamW and clipping, each batch in one pass."""
    shape = GPT(**MODEL)
    module = PlainModule(gpt.layers(shape, Grid(), seed=SEED))
    loss_function = gpt.TokenLoss(shape.vocab_size, LABEL_SMOOTHING, None)
    groups = [
        {"params": [p for p in module.parameters() if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in module.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=BETAS, eps=EPS, foreach=False)
    found: dict[str, list[float]] = {"loss": [], "norm": []}
    for step in range(len(SIZES)):
        batch = beginning(step, shape)
        loss = loss_function(module(batch.ids), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        found["norm"].append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step)
        optimizer.step()
        found["loss"].append(float(loss.detach()))
    return found


@pytest.mark.parametrize("layout", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS])
def test_every_engine_takes_steps_of_any_number_of_micro_batches(layout: str) -> None:
    world, settings = LAYOUTS[layout]
    (expected,) = run_ranks(in_torch, 1)
    loose = 1e-2 if "bf16" in layout else 0.0
    for found in run_ranks(on_engine, world, settings):
        assert found["loss"] == pytest.approx(expected["loss"], rel=max(LOSS, loose))
        assert found["norm"] == pytest.approx(expected["norm"], rel=max(NORM, 10 * loose))
