"""Runs with ramps of sequence lengths and of batch sizes, beside a dense GPT-2 from its formulas that reads windows of the text in fp64."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models import gpt
from models.config import GPT
from parallel.grid import Grid
from parallel.layers import PlainModule
from research.config import serialization
from research.data import order, prepare
from research.tracking.console import Console
from research.training import replay
from tests.harness import run_ranks
from tests.models.helpers.build import values
from tests.models.helpers.dense import Dense
from tests.research.helpers import small_runs as r
from tests.research.helpers.launches import Ended
from tests.research.helpers.small_runs import DROPS, Stage, bits
from tests.research.training.test_resume import LAYOUTS
from tests.research.training.test_resume_line import EXACT

SCHEDULE = {"batch_ramp": (4, 4, 18), "length_ramp": (4, 4, 50), "validate_every": 3}
SHAPES = [(4, 4), (4, 4), (4, 4), (4, 4), (4, 4), *[(8, 8)] * 2, *[(8, 12)] * 2, *[(8, 16)] * 3]
"""(sequences, tokens of each) of the twelve steps. The borders of 18, and of 16⅔, 33⅓ and 50 samples are behind steps 5, 5, 7 and 9."""
LOSS, NORM = 2e-5, 1e-4
"""Relative errors that are allowed."""
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


def go(stage: Stage, name: str, layout: str, schedule: dict | None = None, **more) -> Ended:
    world, parallel = LAYOUTS[layout]
    model, optimizer = {**DROPS, "mlp": "gelu_tanh"}, {"clip": 0.5, "eps": 1e-3, "warmup_steps": 4}
    settings = {"model": model, "optimizer": optimizer, "parallel": parallel, "schedule": {**SCHEDULE, **(schedule or {})}}
    return stage.run(name, world, **settings, **more)


def dense_run(config: Path, place: Path) -> dict[str, dict[int, float]]:
    """Rows by key and step of the run of these settings. Windows, lengths, weights and AdamW are made here, in fp64."""
    experiment = serialization.load(config)
    model, settings = GPT(**experiment.model.model_dump()), experiment.optimizer
    plain = GPT(**experiment.model.model_dump() | dict.fromkeys(DROPS, 0.0))
    corpus = prepare.load(experiment.data, place, model.vocab_size)
    tokens, held_out = (torch.from_numpy(store.tokens.astype(np.int64)) for store in (corpus.train, corpus.validation))
    weights = {name: tensor.double() for name, tensor in values(PlainModule(gpt.layers(model, Grid(), experiment.seed))).items()}
    groups = [
        {"params": [w for w in weights.values() if w.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [w for w in weights.values() if w.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=settings.betas, eps=settings.eps, foreach=False)
    found: dict[str, dict[int, float]] = {"train/loss": {}, "train/grad_norm": {}, "val/loss": {}, "progress/tokens": {}}
    sample = read = 0
    for step, (size, length) in enumerate(SHAPES, 1):
        numbers = torch.arange(sample, sample + size)
        starts = 16 * torch.from_numpy(order.sample(numbers.numpy(), (len(tokens) - 1) // 16, experiment.seed))
        rows = tokens[starts[:, None] + torch.arange(length + 1)]
        dense = Dense(model, weights, numbers, experiment.seed)
        loss = cross_entropy(dense, rows).mean()
        loss.backward()
        for name, tensor in weights.items():
            tensor.grad = dense.weights[name].grad
        norm = torch.nn.utils.clip_grad_norm_(list(weights.values()), settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, settings.lr, settings.min_lr)
        optimizer.step()
        sample, read = sample + size, read + size * length
        found["train/loss"][step], found["train/grad_norm"][step] = float(loss.detach()), float(norm)
        found["progress/tokens"][step] = read
        if step % 3 == 0:
            whole = (len(held_out) - 1) // 16
            windows = [held_out[16 * i : 16 * i + 17] for i in range(whole)]
            parts = [torch.stack(windows), *([held_out[None, 16 * whole :]] if len(held_out) - 1 > 16 * whole else [])]
            nats = [cross_entropy(Dense(plain, weights, torch.zeros(len(part)), 0), part).detach().sum() for part in parts]
            found["val/loss"][step] = float(sum(nats)) / (len(held_out) - 1)
    return found


def cross_entropy(dense: Dense, rows: Tensor) -> Tensor:
    """'b s' of each token of the rows 'b s+1' but the first."""
    return functional.cross_entropy(dense.logits(rows[:, :-1]).transpose(1, 2), rows[:, 1:], reduction="none")


def learning_rate(step: int, peak: float, low: float) -> float:
    """Of step `step`, from 0: four steps of warm-up, then half a cosine that ends with the twelfth."""
    return peak * (step + 1) / 4 if step < 4 else low + (peak - low) * (1 + np.cos(np.pi * (step - 3) / (11 - 3))) / 2


@functools.cache
def truth(config: Path, place: Path) -> dict[str, dict[int, float]]:
    """What `dense_run` returns, from a process that has torch's optimizers imported already."""
    return run_ranks(dense_run, 1, config, place)[0]


def assert_is_dense(ended: Ended, expected: dict[str, dict[int, float]]) -> None:
    assert set(ended.codes) == {0}, ended.said
    assert ended.rows("progress/tokens") == expected["progress/tokens"]
    for key, allowed in (("train/loss", LOSS), ("train/grad_norm", NORM), ("val/loss", LOSS)):
        found = ended.rows(key)
        assert found == pytest.approx(expected[key], rel=allowed), key


@pytest.fixture(scope="module")
def whole(stage: Stage) -> Ended:
    """One rank, never disturbed."""
    return go(stage, "whole", "1")


@SLOW
@pytest.mark.parametrize("layout", ["1", "PP2", "TP2·SP", "DP2", "ZeRO-2", "ZeRO-3", "TP2·PP2"])
def test_a_run_is_dense_torch_on_the_beginnings_of_windows(stage: Stage, whole: Ended, layout: str) -> None:
    """Losses, gradient norms and validations of the whole length, between steps that are shorter; tokens counted one by one."""
    found = whole if layout == "1" else go(stage, f"whole_{layout}", layout)
    assert_is_dense(found, truth(whole.folder.config, stage.place))
    assert "from 4 sequences on, all of them from step 6 · of 4 tokens at first, 16 from step 10" in found.said


@SLOW
@pytest.mark.parametrize(("first", "second", "micro"), [("PP2", "TP2·SP", 1), ("ZeRO-3", "PP2", 4), ("TP2·PP2", "DP2", 2)])
def test_a_run_goes_on_amid_its_ramps_on_another_layout(stage: Stage, whole: Ended, first: str, second: str, micro: int) -> None:
    """Stopped after step 6, the first of 8 tokens."""
    go(stage, f"{first}_to_{second}", first, prelude=r.stopped_in_step_6)
    resumed = go(stage, f"{first}_to_{second}", second, {"micro_batch_size": micro}, resume="auto")
    assert "step 6 of" in resumed.said and "within rounding" in resumed.said
    assert_is_dense(resumed, truth(whole.folder.config, stage.place))


@SLOW
@pytest.mark.parametrize("layout", ["PP2", "TP2·SP"])
def test_stopped_amid_its_ramps_and_resumed_is_never_stopped(stage: Stage, layout: str) -> None:
    undisturbed = go(stage, f"exact_{layout}_whole", layout)
    go(stage, f"exact_{layout}", layout, prelude=r.stopped_in_step_6)
    resumed = go(stage, f"exact_{layout}", layout, resume="auto")
    assert EXACT in resumed.said
    for key in ("train/loss", "train/grad_norm", "train/lr", "val/loss", "progress/tokens"):
        assert resumed.hexes(key) == undisturbed.hexes(key) != {}
    assert bits(resumed.folder) == bits(undisturbed.folder)


@SLOW
def test_a_step_is_replayed_with_its_own_length_and_size(whole: Ended) -> None:
    """Step 8 is reached from the initial weights, through steps of other sizes and lengths."""
    experiment = serialization.load(whole.folder.config)
    for step in (8, 12):
        _, found = replay.replay(whole.folder, experiment, step, Console())
        assert found.culprits == [] and found.loss == pytest.approx(whole.rows()[step], rel=LOSS)
        assert found.grad_norm == pytest.approx(whole.rows("train/grad_norm")[step], rel=NORM)
