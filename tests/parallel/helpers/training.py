"""A small GPT trained for a few steps on this rank's real DeepSpeed engine: what the layout tests compare."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from models import gpt
from models.config import GPT
from parallel.checkpoint.load import load_checkpoint
from parallel.checkpoint.saver import Saver
from parallel.engines.deepspeed_config import EngineSettings
from parallel.engines.engine import Engine, make_engine
from parallel.engines.micro_batch import MicroBatch
from parallel.grid import Grid, make_grid

MODEL = dict(
    num_layers=4, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=64, vocab_size=83, seq_length=16, norm="layernorm", norm_eps=1e-5,
    position="learned", mlp="gelu_tanh", residual="pre_norm", init="small_wang", bias=True, qkv_bias=True, qk_norm=False, tied=True,
    embedding_dropout=0.0, residual_dropout=0.0, mlp_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
"""A GPT-2 in small, with a vocabulary that no tensor degree divides."""

LLAMA = dict(
    num_layers=2, num_kv_heads=2, norm="rmsnorm", position="rotary", rotary_fraction=1.0, rotary_base=10000.0, rotary_scaling="none",
    mlp="swiglu", bias=False, qkv_bias=False, qk_norm=True, tied=False,
)  # fmt: skip
"""What a Llama (with normalised queries and keys) has otherwise."""

SEED, BATCH, MICRO, STEPS = 7, 8, 4, 20
CLIP, BETAS, EPS, WEIGHT_DECAY, LABEL_SMOOTHING = 0.25, (0.9, 0.95), 1e-3, 0.1, 0.1
LOGITS_AT_ONCE, BUCKET_ELEMENTS = 500, 3000
"""Several blocks of rows and several buckets, the last of each not full; some parameters are larger than a bucket."""
ZERO_3 = {
    "sub_group_size": 2000,
    "stage3_param_persistence_threshold": 50,
    "stage3_prefetch_bucket_size": 2000,
    "stage3_max_live_parameters": 6000,
    "stage3_max_reuse_distance": 3000,
}
"""Most parameters are gathered at each use and released after it, and the optimizer updates them in several groups."""
EVALUATION = 1000
"""The number of the batch that is never trained on."""


def learning_rate(step: int) -> float:
    """Rises over the steps, so that a step at another one's rate is seen."""
    return 5e-3 * (step + 1) / STEPS


def batch_of(step: int, model: GPT) -> MicroBatch:
    """A step's global batch: counting in fives, which is soon learned.

    Every third token of its second half is masked, so that a mean of means is another number. Weights are the mask over its
    sum: Σ weights · loss is the mean over unmasked tokens.
    """
    g = torch.Generator().manual_seed(step)
    first = torch.randint(0, model.vocab_size, (BATCH, 1), generator=g)
    tokens = (first + 5 * torch.arange(model.seq_length + 1)) % model.vocab_size
    mask = torch.ones(BATCH, model.seq_length)
    mask[BATCH // 2 :, ::3] = 0
    samples = step * BATCH + torch.arange(BATCH)
    return MicroBatch(tokens[:, :-1], (tokens[:, 1:], mask / mask.sum()), {"samples": samples})


def micro_batches(step: int, model: GPT, grid: Grid, micro: int) -> Iterator[MicroBatch]:
    """This data rank's micro-batches of a step, weighted for engines that average over micro-batches and data ranks."""
    share = BATCH // grid.data
    ids, (targets, weights), context = batch_of(step, model)
    for first in range(grid.data_rank * share, (grid.data_rank + 1) * share, micro):
        rows = slice(first, first + micro)
        labels = targets[rows], weights[rows] * (BATCH // micro)
        yield MicroBatch(ids[rows], labels, {name: tensor[rows] for name, tensor in context.items()})


def build(
    model=(), pipe=1, tensor=1, sequence=False, recompute="none", precision="fp32", clip=CLIP, micro=MICRO, variants=None, **settings
) -> tuple[Engine, GPT, Grid]:
    """An engine on this rank, its model's settings and its grid."""
    if precision == "fp16":
        get_accelerator().is_fp16_supported = lambda: True  # torch computes it on any CPU, if slowly; DeepSpeed asks for kernels
    shape = GPT(**MODEL | dict(model))
    grid = make_grid(pipe, tensor, sequence)
    explicit = {"zero_optimization": ZERO_3, **settings.pop("explicit", {})}
    derived = EngineSettings(
        precision=precision, micro_batch_size=micro, micro_batches=BATCH // grid.data // micro, clip=clip, lr=1.0, betas=BETAS, eps=EPS,
        weight_decay=WEIGHT_DECAY, bucket_elements=BUCKET_ELEMENTS, **{"zero_stage": 1, **settings, "explicit": explicit},
    )  # fmt: skip
    loss = gpt.TokenLoss(shape.vocab_size, LABEL_SMOOTHING, grid.tensor_group, LOGITS_AT_ONCE)
    held_out_loss = gpt.TokenLoss(shape.vocab_size, 0.0, grid.tensor_group, LOGITS_AT_ONCE)
    return make_engine(gpt.layers(shape, grid, SEED, variants, recompute), loss, grid, derived, held_out_loss), shape, grid


def evaluate(engine: Engine, shape: GPT, grid: Grid) -> float:
    """The mean over unmasked tokens of one global batch, the same samples on every layout."""
    losses = [
        engine.evaluate_batch(micro_batch) for micro_batch in micro_batches(EVALUATION, shape, grid, engine.settings.micro_batch_size)
    ]
    return sum(losses) / len(losses)


def train(
    steps=STEPS, evaluate_every=0, weights=False, resume=None, save=None, spoil: Callable | None = None,
    reweigh: Callable | None = None, **layout
) -> dict:  # fmt: skip
    """Losses, norms, evaluations, loss scales, steps skipped so far and (on request) this stage's final weights, as this rank sees them.

    `resume`: a checkpoint to go on from, with its step. `save`: {after step: folder to save to}, or a folder for the last one.
    `spoil(engine)` and `reweigh(micro_batches, grid)` break one thing on purpose.
    """
    engine, shape, grid = build(**layout)
    first = load_checkpoint(Path(resume), engine)["step"] if resume else 0
    if spoil:
        spoil(engine)
    found: dict = {"loss": [], "norm": [], "eval": [], "scale": [], "skipped": []}
    saves = save if isinstance(save, dict) else {steps: save} if save else {}
    if 0 in saves:
        Saver().save(Path(saves[0]), engine, {"step": 0})
    for step in range(first, steps):
        batches = micro_batches(step, shape, grid, engine.settings.micro_batch_size)
        found["scale"].append(engine.loss_scale)
        found["loss"].append(engine.train_batch(reweigh(batches, grid) if reweigh else batches, learning_rate(step)))
        found["norm"].append(engine.gradient_norm())
        found["skipped"].append(engine.skipped_steps)
        if evaluate_every and step % evaluate_every == 0:
            found["eval"].append(evaluate(engine, shape, grid))
        if step + 1 in saves:
            Saver().save(Path(saves[step + 1]), engine, {"step": step + 1})
    found["eval"].append(evaluate(engine, shape, grid))
    if weights:
        found["weights"] = dict(engine.full_weights())
    return found


def call(arguments: dict):
    """`train(**arguments)`, for a harness that passes positional arguments."""
    return train(**arguments)
