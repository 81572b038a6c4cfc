"""T5 on real engines: cuts in front of, at and behind the border of encoder and decoder, the tied table, ZeRO 1–3, beside plain torch.

Gradients and logits are compared with transformers' in tests/models/test_t5.py.
"""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from models import t5
from models.encoder_config import T5
from models.gpt import TokenLoss
from parallel.engines.deepspeed_config import EngineSettings
from parallel.engines.engine import Engine, make_engine
from parallel.engines.micro_batch import MicroBatch
from parallel.grid import Grid, make_grid
from parallel.layers import PlainModule
from tests.harness import run_ranks
from tests.models.helpers.t5 import DROPPING, PADDING, shape
from tests.parallel.helpers.training import BETAS, BUCKET_ELEMENTS, CLIP, EPS, SEED, WEIGHT_DECAY, ZERO_3, learning_rate

STEPS, BATCH, LABEL_SMOOTHING, HELD_OUT, CONTEXT = 6, 8, 0.1, 1_000, ("segments",)
LOSS, NORM, WEIGHTS, LOW_PRECISION_LOSS = 2e-5, 1e-5, 1e-5, 1e-3
"""Relative errors that are allowed."""
LAYOUTS = {
    "one rank": (1, {}),
    "PP2": (2, dict(pipe=2, micro=1)),
    "PP3": (3, dict(pipe=3)),
    "PP4": (4, dict(pipe=4)),
    "TP2": (2, dict(tensor=2)),
    "TP2·SP": (2, dict(tensor=2, sequence=True)),
    "ZeRO-1": (2, dict(micro=2)),
    "ZeRO-2": (2, dict(zero_stage=2, micro=2)),
    "ZeRO-3": (2, dict(zero_stage=3)),
    "PP2·TP2": (4, dict(pipe=2, tensor=2)),
    "PP2·TP2·SP, full": (4, dict(pipe=2, tensor=2, sequence=True, recompute="full")),
    "PP2·DP2, selective": (4, dict(pipe=2, micro=2, recompute="selective")),
    "TP2·SP·ZeRO-3": (4, dict(tensor=2, sequence=True, zero_stage=3)),
}
MODELS = {  # blocks of the encoder and of the decoder: where two stages are cut is in front of, at or behind the border
    "at the border": dict(num_encoder_layers=2, num_layers=2, **DROPPING),
    "in front of it": dict(num_encoder_layers=3, num_layers=1, **DROPPING),
    "behind it": dict(num_encoder_layers=1, num_layers=4, tied=False, mlp="geglu_tanh"),
}
QUICK = {("at the border", "PP2")}
"""The pipeline has the tied table, and the encoder's output crosses from one stage to the next."""


def pairs_of(step: int, model: T5) -> MicroBatch:
    """A step's global batch: two pairs in each row, of which the target counts in fives from the first token of the source."""
    g, (s, t), v = torch.Generator().manual_seed(step), (model.source_length, model.seq_length), model.vocab_size
    source, target = torch.zeros(BATCH, s, dtype=torch.int64), torch.zeros(BATCH, t + 1, dtype=torch.int64)
    of_source, of_target = torch.full((BATCH, s), PADDING), torch.full((BATCH, t), PADDING)
    for row in range(BATCH):
        at = then = 0
        for number in range(2):
            first, n = int(torch.randint(v, (), generator=g)), int(torch.randint(2, t // 2 + 1, (), generator=g))
            source[row, at : at + n + 1] = (first + 3 * torch.arange(n + 1)) % v
            target[row, then : then + n + 1] = (first + 5 * torch.arange(n + 1)) % v
            of_source[row, at : at + n + 1], of_target[row, then : then + n] = number, number
            at, then = at + n + 1, then + n
    mask = of_target != PADDING
    context = {"samples": step * BATCH + torch.arange(BATCH), "segments": torch.cat([of_source, of_target], 1)}
    return MicroBatch(torch.cat([source, target[:, :-1]], 1), (target[:, 1:], mask / mask.sum()), context)


def micro_batches(step: int, model: T5, grid: Grid, micro: int) -> Iterator[MicroBatch]:
    """This data rank's micro-batches of a step, weighted for engines that average over micro-batches and data ranks."""
    share = BATCH // grid.data
    ids, (targets, weights), context = pairs_of(step, model)
    for first in range(grid.data_rank * share, (grid.data_rank + 1) * share, micro):
        rows = slice(first, first + micro)
        labels = targets[rows], weights[rows] * (BATCH // micro)
        yield MicroBatch(ids[rows], labels, {name: tensor[rows] for name, tensor in context.items()})


def train(
    settings: dict, pipe=1, tensor=1, sequence=False, recompute="none", precision="fp32", micro=4, zero_stage=1,
    spoil: Callable[[Engine], None] | None = None,
) -> dict[str, list | dict]:  # fmt: skip
    """Losses, gradient norms, the loss of a held-out batch, and this stage's final weights."""
    model, grid = shape(**settings), make_grid(pipe, tensor, sequence)
    derived = EngineSettings(
        precision=precision, micro_batch_size=micro, micro_batches=BATCH // grid.data // micro, clip=CLIP, lr=1.0, betas=BETAS, eps=EPS,
        weight_decay=WEIGHT_DECAY, bucket_elements=BUCKET_ELEMENTS, zero_stage=zero_stage, explicit={"zero_optimization": ZERO_3},
    )  # fmt: skip
    losses = [TokenLoss(model.vocab_size, smoothing, grid.tensor_group) for smoothing in (LABEL_SMOOTHING, 0.0)]
    engine = make_engine(t5.layers(model, grid, SEED, recompute=recompute, context=CONTEXT), losses[0], grid, derived, losses[1])
    if spoil:
        spoil(engine)
    found: dict = {"loss": [], "norm": []}
    for step in range(STEPS):
        found["loss"].append(engine.train_batch(micro_batches(step, model, grid, micro), learning_rate(step)))
        found["norm"].append(engine.gradient_norm())
    held_out = list(micro_batches(HELD_OUT, model, grid, micro))
    found["held out"] = [sum(engine.evaluate_batch(batch) for batch in held_out) / len(held_out)]
    return found | {"weights": dict(engine.full_weights())}


def call(arguments: dict) -> dict[str, list | dict]:
    return train(**arguments)


@functools.cache
def trained_by_torch_alone(name: str) -> dict:
    """The same of the plain module with AdamW and clipping by torch, the whole global batch in one pass; nothing of an engine."""
    model = shape(**MODELS[name])
    module = PlainModule(t5.layers(model, Grid(), SEED, context=CONTEXT))
    groups = [{"params": [p for p in module.parameters() if (p.dim() >= 2) is matrix], "weight_decay": decay}
              for matrix, decay in ((True, WEIGHT_DECAY), (False, 0.0))]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=BETAS, eps=EPS, foreach=False)
    found: dict = {"loss": [], "norm": []}
    for step in range(STEPS):
        batch = pairs_of(step, model)
        loss = TokenLoss(model.vocab_size, LABEL_SMOOTHING, None)(module(batch.inputs(module.context)), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        found["norm"].append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        found["loss"].append(float(loss.detach()))
    held_out = pairs_of(HELD_OUT, model)
    with torch.no_grad():
        logits = module.eval()(held_out.inputs(module.context))
        found["held out"] = [float(TokenLoss(model.vocab_size, 0.0, None)(logits, held_out.labels))]
    return found | {"weights": {name: p.detach() for name, p in module.named_parameters()}}


@functools.cache
def run(name: str, layout: str, precision: str = "fp32") -> list[dict]:
    world, settings = LAYOUTS[layout]
    return run_ranks(call, world, dict(settings, settings=MODELS[name], precision=precision), timeout=480.0)


def furthest(found: list[float], expected: list[float]) -> float:
    """The largest relative error of a list of numbers."""
    assert len(found) == len(expected) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


CASES = [pytest.param(name, layout, marks=() if (name, layout) in QUICK else pytest.mark.slow) for name in MODELS for layout in LAYOUTS]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_layout_trains_as_torch_alone_does(name: str, layout: str) -> None:
    """Losses, norms, evaluations and every weight after six steps, the clip binding in each."""
    ranks, alone = run(name, layout), trained_by_torch_alone(name)
    assert min(alone["norm"]) > 2 * CLIP
    for rank in ranks:
        assert furthest(rank["loss"], alone["loss"]) <= LOSS and furthest(rank["held out"], alone["held out"]) <= LOSS
        assert furthest(rank["norm"], alone["norm"]) <= NORM
    weights: dict[str, Tensor] = {name: tensor for rank in ranks for name, tensor in rank["weights"].items()}
    assert weights.keys() == alone["weights"].keys()
    errors = {name: float((weights[name] - true).norm() / true.norm()) for name, true in alone["weights"].items()}
    assert max(errors.values()) <= WEIGHTS, max(errors, key=errors.__getitem__)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["PP2", "TP2·SP", "ZeRO-3", "PP2·TP2"])
def test_bf16_losses_agree(layout: str) -> None:
    (alone,) = run("at the border", "one rank", "bf16")
    for rank in run("at the border", layout, "bf16"):
        assert furthest(rank["loss"], alone["loss"]) <= LOW_PRECISION_LOSS
        assert furthest(rank["held out"], alone["held out"]) <= LOW_PRECISION_LOSS


def count_the_table_twice(engine: Engine) -> None:
    """The last stage's copy of the table counts in the gradient norm beside the first stage's."""
    engine.parameters["embedding.weight"].ds_pipe_replicated = False


def test_a_table_counted_twice_is_noticed() -> None:
    settings = dict(settings=MODELS["at the border"], pipe=2, micro=4, spoil=count_the_table_twice)
    ranks, alone = run_ranks(call, 2, settings), trained_by_torch_alone("at the border")
    assert all(furthest(rank["norm"], alone["norm"]) > 1e-3 for rank in ranks)
