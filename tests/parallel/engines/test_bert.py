"""BERT on real engines: its tied table and the bias of its vocabulary, both heads, padding and dropout, beside plain torch in one process.

Gradients and logits are compared with transformers' in tests/models/test_bert.py.
"""

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from models import bert
from models.encoder_config import BERT
from parallel.engines.deepspeed_config import EngineSettings
from parallel.engines.engine import make_engine
from parallel.engines.micro_batch import MicroBatch
from parallel.grid import Grid, make_grid
from parallel.layers import PlainModule
from tests.harness import run_ranks
from tests.models.helpers.bert import CONTEXT, EVERYWHERE, LENGTH, VOCAB, shape
from tests.parallel.helpers.training import BETAS, BUCKET_ELEMENTS, CLIP, EPS, SEED, WEIGHT_DECAY, ZERO_3, learning_rate

STEPS, BATCH, LABEL_SMOOTHING, HELD_OUT = 6, 8, 0.1, 1_000
LOSS, NORM, WEIGHTS, LOW_PRECISION_LOSS = 2e-5, 1e-5, 1e-5, 1e-3
"""Relative errors that are allowed."""
LAYOUTS = {
    "one rank": (1, {}),
    "PP2": (2, dict(pipe=2, micro=1)),
    "TP2·SP": (2, dict(tensor=2, sequence=True)),
    "ZeRO-1": (2, dict(micro=2)),
    "ZeRO-2": (2, dict(zero_stage=2, micro=2)),
    "ZeRO-3": (2, dict(zero_stage=3)),
    "PP2·TP2": (4, dict(pipe=2, tensor=2)),
    "PP2·TP2·SP, full": (4, dict(pipe=2, tensor=2, sequence=True, recompute="full")),
    "PP2·DP2": (4, dict(pipe=2, micro=2)),
    "TP2·ZeRO-3": (4, dict(tensor=2, zero_stage=3)),
}
QUICK = {"PP2"}
"""The pipeline has the tied table, the bias behind it and sentence logits behind that."""
MODELS = {
    "post_norm": dict(init="small_wang", **EVERYWHERE),
    "pre_norm": dict(init="small_wang", residual="pre_norm", sentence_head=False),
}


def batch_of(step: int, model: BERT) -> MicroBatch:
    """A step's global batch: counting in fives with some tokens masked, in two sentences, some of which are cut off by padding."""
    g = torch.Generator().manual_seed(step)
    first, places = torch.randint(0, VOCAB, (BATCH, 1), generator=g), torch.arange(LENGTH)
    lengths, border = (torch.randint(low, LENGTH, (BATCH, 1), generator=g) for low in (LENGTH // 2, 4))
    targets, padding = (first + 5 * places) % VOCAB, places >= lengths
    masked = (torch.rand(BATCH, LENGTH, generator=g) < 0.3) & ~padding
    masked[:, 0] = True  # no micro-batch is without a mask
    sentences, weights = torch.randint(0, 2, (BATCH,), generator=g), masked / masked.sum()
    labels = (targets, weights, sentences, torch.full((BATCH,), 1 / BATCH))[: 4 if model.sentence_head else 2]
    context = {"samples": step * BATCH + torch.arange(BATCH), "segments": torch.where(padding, -1, 0)}
    context["token_types"] = ((places >= border) & (sentences[:, None] > 0)).long()  # so that the sentence head can learn something
    return MicroBatch(torch.where(masked, 0, targets), labels, context)


def micro_batches(step: int, model: BERT, grid: Grid, micro: int) -> Iterator[MicroBatch]:
    """This data rank's micro-batches of a step, weighted for engines that average over micro-batches and data ranks."""
    share = BATCH // grid.data
    ids, labels, context = batch_of(step, model)
    for first in range(grid.data_rank * share, (grid.data_rank + 1) * share, micro):
        rows = slice(first, first + micro)
        own = [label[rows] * (BATCH // micro if label.is_floating_point() else 1) for label in labels]
        yield MicroBatch(ids[rows], tuple(own), {name: tensor[rows] for name, tensor in context.items()})


def loss_of(model: BERT, grid: Grid, smoothing: float):
    return (bert.PretrainingLoss if model.sentence_head else bert.TokenLoss)(VOCAB, smoothing, grid.tensor_group)


def train(
    settings: dict, pipe=1, tensor=1, sequence=False, recompute="none", precision="fp32", micro=4, zero_stage=1
) -> dict[str, list | dict]:
    """Losses, gradient norms, the loss of a held-out batch, what is observed of its logits, and this stage's final weights."""
    model, grid = shape(**settings), make_grid(pipe, tensor, sequence)
    derived = EngineSettings(
        precision=precision, micro_batch_size=micro, micro_batches=BATCH // grid.data // micro, clip=CLIP, lr=1.0, betas=BETAS, eps=EPS,
        weight_decay=WEIGHT_DECAY, bucket_elements=BUCKET_ELEMENTS, zero_stage=zero_stage, explicit={"zero_optimization": ZERO_3},
    )  # fmt: skip
    layers = bert.layers(model, grid, SEED, recompute=recompute, context=CONTEXT)
    engine = make_engine(layers, loss_of(model, grid, LABEL_SMOOTHING), grid, derived, loss_of(model, grid, 0.0))
    found: dict = {"loss": [], "norm": []}
    for step in range(STEPS):
        found["loss"].append(engine.train_batch(micro_batches(step, model, grid, micro), learning_rate(step)))
        found["norm"].append(engine.gradient_norm())
    held_out = list(micro_batches(HELD_OUT, model, grid, micro))
    found["held out"] = [sum(engine.evaluate_batch(batch) for batch in held_out) / len(held_out)]
    if model.sentence_head:
        seen = [engine.observe(batch, lambda logits: logits[1], (micro, 2)) for batch in held_out]
        found["sentences"] = torch.cat(seen, 1).flatten().tolist()  # data rank by data rank, which is the order of the batch
    return found | {"weights": dict(engine.full_weights())}


def call(arguments: dict) -> dict[str, list | dict]:
    return train(**arguments)


@functools.cache
def trained_by_torch_alone(name: str) -> dict:
    """The same of the plain module with AdamW and clipping by torch, the whole global batch in one pass; nothing of an engine."""
    model = shape(**MODELS[name])
    module = PlainModule(bert.layers(model, Grid(), SEED, context=CONTEXT))
    groups = [{"params": [p for p in module.parameters() if (p.dim() >= 2) is matrix], "weight_decay": decay}
              for matrix, decay in ((True, WEIGHT_DECAY), (False, 0.0))]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=BETAS, eps=EPS, foreach=False)
    found: dict = {"loss": [], "norm": []}
    for step in range(STEPS):
        batch = batch_of(step, model)
        loss = loss_of(model, Grid(), LABEL_SMOOTHING)(module(batch.inputs(module.context)), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        found["norm"].append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        found["loss"].append(float(loss.detach()))
    held_out = batch_of(HELD_OUT, model)
    with torch.no_grad():
        logits = module.eval()(held_out.inputs(module.context))
        found["held out"] = [float(loss_of(model, Grid(), 0.0)(logits, held_out.labels))]
    if model.sentence_head:
        found["sentences"] = logits[1].flatten().tolist()
    return found | {"weights": {name: p.detach() for name, p in module.named_parameters()}}


@functools.cache
def run(name: str, layout: str, precision: str = "fp32") -> list[dict]:
    world, settings = LAYOUTS[layout]
    return run_ranks(call, world, dict(settings, settings=MODELS[name], precision=precision), timeout=480.0)


def furthest(found: list[float], expected: list[float]) -> float:
    """The largest relative error of a list of numbers."""
    assert len(found) == len(expected) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS])
@pytest.mark.parametrize("name", ["post_norm", pytest.param("pre_norm", marks=pytest.mark.slow)])
def test_a_layout_trains_as_torch_alone_does(name: str, layout: str) -> None:
    """Losses, norms, evaluations and every weight after six steps, the clip binding in each."""
    ranks, alone = run(name, layout), trained_by_torch_alone(name)
    assert min(alone["norm"]) > 2 * CLIP
    for rank in ranks:
        assert furthest(rank["loss"], alone["loss"]) <= LOSS and furthest(rank["held out"], alone["held out"]) <= LOSS
        assert furthest(rank["norm"], alone["norm"]) <= NORM
        if "sentences" in alone:
            assert float((torch.tensor(rank["sentences"]) - torch.tensor(alone["sentences"])).abs().max()) <= LOSS
    weights: dict[str, Tensor] = {name: tensor for rank in ranks for name, tensor in rank["weights"].items()}
    assert weights.keys() == alone["weights"].keys() and weights["head_bias.bias"].count_nonzero() == VOCAB
    errors = {name: float((weights[name] - true).norm() / true.norm()) for name, true in alone["weights"].items()}
    assert max(errors.values()) <= WEIGHTS, max(errors, key=errors.__getitem__)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["PP2", "TP2·SP", "ZeRO-3", "PP2·TP2"])
def test_bf16_losses_agree(layout: str) -> None:
    (alone,) = run("post_norm", "one rank", "bf16")
    for rank in run("post_norm", layout, "bf16"):
        assert furthest(rank["loss"], alone["loss"]) <= LOW_PRECISION_LOSS
        assert furthest(rank["held out"], alone["held out"]) <= LOW_PRECISION_LOSS
