"""A small GPT trained for a few steps on this rank's real DeepSpeed engine: what the layout tests compare."""

import torch

from models import gpt
from models.config import GPT
from parallel.deepspeed_config import EngineSettings
from parallel.engine import MicroBatch, make_engine
from parallel.grid import make_grid

MODEL = dict(
    num_layers=4, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=64, vocab_size=83, seq_length=16, norm="layernorm", norm_eps=1e-5,
    position="learned", mlp="gelu_tanh", residual="pre_norm", init="gpt2", bias=True, qkv_bias=True, qk_norm=False, tied=True,
)  # fmt: skip
"""A GPT-2 in small, with a vocabulary that no tensor degree divides."""

BATCH, MICRO = 8, 2


def batch_of(step: int, model: GPT, first: int, count: int) -> MicroBatch:
    """Samples [first, first + count) of a step, with every third token unmasked in the second half of the batch."""
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, model.vocab_size, (BATCH, model.seq_length + 1), generator=g)
    mask = torch.ones(BATCH, model.seq_length)
    mask[BATCH // 2 :, ::3] = 0
    rows = slice(first, first + count)
    return MicroBatch(tokens[rows, :-1], tokens[rows, 1:], mask[rows] / mask.sum())


def micro_batches(step: int, model: GPT, grid, accumulated: int):
    """This data rank's micro-batches, weighted as research/data/batches.py defines it."""
    for i in range(accumulated):
        ids, targets, weights = batch_of(step, model, grid.data_rank * BATCH // grid.data + i * MICRO, MICRO)
        yield MicroBatch(ids, targets, weights * accumulated * grid.data)


def train(pipe=1, tensor=1, steps=5, model=(), precision="fp32", clip=0.5, want=("loss", "norm"), **settings):
    """Losses, norms, an evaluation and (on request) the final weights, as every rank sees them."""
    shape = GPT(**{**MODEL, **dict(model)})
    grid = make_grid(pipe, tensor)
    accumulated = BATCH // grid.data // MICRO
    engine = make_engine(
        gpt.layers(shape, grid, seed=7),
        gpt.TokenLoss(shape.vocab_size, 0.1, grid.tensor_group),
        grid,
        EngineSettings(
            precision=precision, micro_batch_size=MICRO, micro_batches=accumulated, clip=clip, lr=1e-3, betas=(0.9, 0.95),
            eps=1e-3, weight_decay=0.1, **{"zero_stage": 1, **settings},
        ),
    )  # fmt: skip
    losses, norms = [], []
    for step in range(steps):
        losses.append(engine.train_batch(micro_batches(step, shape, grid, accumulated), lr=1e-2 * (step + 1) / steps))
        norms.append(engine.gradient_norm())
    ids, targets, weights = batch_of(99, shape, grid.data_rank * MICRO, MICRO)
    evaluated = engine.evaluate_batch(MicroBatch(ids, targets, torch.ones_like(weights) / weights.numel()))
    found = {"loss": losses, "norm": norms, "eval": evaluated}
    if "weights" in want:
        found["weights"] = dict(engine.full_weights())
    return found


def call(arguments: dict):
    """`train(**arguments)`, for a harness that passes positional arguments."""
    return train(**arguments)
