"""Steps of other lengths: each engine's losses, gradients and evaluations beside a dense GPT-2 from its formulas, in fp64.

Sequences are cut to their first tokens, the number of micro-batches changes as well, and between steps the whole length is evaluated.
"""

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models import gpt
from models.config import GPT
from models.inference.scoring import token_scores
from parallel.engines.micro_batch import MicroBatch
from parallel.grid import Grid
from parallel.layers import PlainModule
from tests.harness import run_ranks
from tests.models.helpers.build import values, worst
from tests.models.helpers.dense import Dense
from tests.parallel.helpers import training
from tests.parallel.helpers.training import BETAS, CLIP, EPS, LABEL_SMOOTHING, MODEL, SEED, WEIGHT_DECAY

DROPS = {f"{place}_dropout": 0.1 for place in ("embedding", "residual", "mlp", "attention")}
SHAPES = [(2, 4), (2, 4), (4, 4), (4, 10), (4, 16), (2, 16), (4, 6)]
"""(sequences, tokens of each) of each step. Both fall once, too, and each changes while the other stays."""
EVALUATED = (1, 3, 6)
"""Steps after which sequences of 16 tokens are evaluated and observed, which is between steps of equal and of other shapes."""
LOSS, GRADIENTS = 5e-6, 2e-5
"""Relative errors that are allowed. Measured: losses 1e-7, log-probabilities 3e-7, gradients 2e-6."""
LAYOUTS = {
    "PP2": (2, {"pipe": 2}),
    "one rank": (1, {}),
    "TP2·SP": (2, {"tensor": 2, "sequence": True}),
    "PP4": (4, {"pipe": 4}),  # stages in the middle
    "PP2·TP2·SP": (4, {"pipe": 2, "tensor": 2, "sequence": True}),
    "PP2·DP2": (4, {"pipe": 2}),
    "ZeRO-2": (2, {"zero_stage": 2}),
    "ZeRO-3": (2, {"zero_stage": 3}),
    "PP2, recomputed": (2, {"pipe": 2, "recompute": "full"}),
    "TP2·SP, recomputed": (2, {"tensor": 2, "sequence": True, "recompute": "selective"}),
}
QUICK = {"PP2"}


def beginning(step: int, model: GPT) -> MicroBatch:
    """The first tokens of the first sequences of the step's batch, weighted for the mean over their unmasked tokens."""
    ids, (targets, weights), context = training.batch_of(step, model)
    size, length = SHAPES[step]
    mask = (weights[:size, :length] > 0).float()
    labels = targets[:size, :length], mask / mask.sum()
    return MicroBatch(ids[:size, :length].contiguous(), labels, {name: tensor[:size] for name, tensor in context.items()})


def on_engine(layout: dict) -> list[dict]:
    """Micro-batches of one sequence. Gradients are this stage's."""
    engine, model, grid = training.build(DROPS, micro=1, **layout)
    found: list[dict] = []
    gradients: dict[str, Tensor] = {}
    engine.watch_gradients(gradients.update)
    for step, (size, _) in enumerate(SHAPES):
        ids, (targets, weights), context = beginning(step, model)
        share = size // grid.data
        parts = [slice(row, row + 1) for row in range(grid.data_rank * share, (grid.data_rank + 1) * share)]
        batches = (
            MicroBatch(ids[rows], (targets[rows], weights[rows] * size), {name: t[rows] for name, t in context.items()}) for rows in parts
        )
        loss = engine.train_batch(batches, training.learning_rate(step), len(parts))
        found.append({"loss": loss, "gradients": dict(gradients)})
        if step in EVALUATED:
            found[-1]["evaluated"] = training.evaluate(engine, model, grid)
            found[-1]["observed"] = observed(engine, model, grid)
    return found


def observed(engine, model: GPT, grid: Grid) -> Tensor:
    """'b s' of one sequence, the same on every data rank: the log-probability of each target."""
    ids, (targets, weights), context = training.batch_of(training.EVALUATION, model)
    batch = MicroBatch(ids[:1], (targets[:1], weights[:1]), {name: tensor[:1] for name, tensor in context.items()})
    return engine.observe(batch, lambda logits: token_scores(logits, targets[:1], grid.tensor_group, model.vocab_size)[0], (1, 16))[0]


def by_formulas() -> list[dict]:
    """Loss, gradients and evaluations of each step. AdamW and clipping are torch's."""
    model, plain = GPT(**MODEL | DROPS), GPT(**MODEL)
    weights = {name: tensor.double() for name, tensor in values(PlainModule(gpt.layers(model, Grid(), seed=SEED))).items()}
    groups = [
        {"params": [w for w in weights.values() if w.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [w for w in weights.values() if w.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=BETAS, eps=EPS, foreach=False)
    found: list[dict] = []
    for step in range(len(SHAPES)):
        ids, (targets, token_weights), context = beginning(step, model)
        dense = Dense(model, weights, context["samples"], SEED)
        losses = functional.cross_entropy(dense.logits(ids).transpose(1, 2), targets, reduction="none", label_smoothing=LABEL_SMOOTHING)
        loss = (token_weights * losses).sum()
        loss.backward()
        gradients = {name: tensor.grad for name, tensor in dense.weights.items()}
        found.append({"loss": float(loss.detach()), "gradients": {name: tensor.clone() for name, tensor in gradients.items()}})
        for name, tensor in weights.items():
            tensor.grad = gradients[name]
        torch.nn.utils.clip_grad_norm_(list(weights.values()), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step)
        optimizer.step()
        if step in EVALUATED:
            ids, (targets, token_weights), context = training.batch_of(training.EVALUATION, plain)
            scores = Dense(plain, weights, context["samples"], SEED).logits(ids).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
            found[-1]["evaluated"] = -float((token_weights * scores).sum().detach())
            found[-1]["observed"] = scores[:1].detach()
    return found


@functools.cache
def truth() -> list[dict]:
    """What `by_formulas` returns, from a process that has torch's optimizers imported already."""
    return run_ranks(by_formulas, 1)[0]


@pytest.mark.parametrize("layout", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS])
def test_every_engine_takes_steps_of_any_length(layout: str) -> None:
    world, settings = LAYOUTS[layout]
    ranks = run_ranks(on_engine, world, settings)
    for step, true in enumerate(truth()):
        gradients = {name: tensor for rank in ranks for name, tensor in rank[step]["gradients"].items()}
        error, name = worst(gradients, true["gradients"])
        assert error <= GRADIENTS, (step, name)
        for rank in ranks:
            assert rank[step]["loss"] == pytest.approx(true["loss"], rel=LOSS)
            if step in EVALUATED:
                assert rank[step]["evaluated"] == pytest.approx(true["evaluated"], rel=LOSS)
                torch.testing.assert_close(rank[step]["observed"].double(), true["observed"], rtol=LOSS, atol=0)
