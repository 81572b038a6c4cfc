"""The learning rate: exact at its vertices, equal to closed forms and to transformers' schedulers where they mean the same."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import transformers

from parallel.errors import Mistake
from research.config import schema
from research.training.schedule import DECAYS, learning_rate

LR, MIN = 3e-3, 3e-4


def optimizer(decay: str, warmup_steps: int = 10, min_lr: float = MIN, decay_steps: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(lr=LR, min_lr=min_lr, decay=decay, warmup_steps=warmup_steps, decay_steps=decay_steps)


def curve(steps: int, **settings) -> list[float]:
    return [learning_rate(step, optimizer(**settings), steps) for step in range(steps)]


@pytest.mark.parametrize("decay", DECAYS)
def test_warm_up_is_a_line_that_reaches_lr_exactly(decay):
    rates = curve(100, decay=decay, decay_steps=20)
    assert rates[:10] == pytest.approx([LR * (i + 1) / 10 for i in range(10)], rel=1e-15)
    assert rates[9] == LR and rates[0] > 0
    assert max(rates) == LR and min(rates[10:]) >= MIN


@pytest.mark.parametrize("decay", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("low", [0.0, 1e-4, 3e-4, LR])
def test_decays_end_at_min_lr_exactly(decay, warmup, low):
    rates = curve(41, decay=decay, warmup_steps=warmup, min_lr=low, decay_steps=13)
    assert rates[-1] == low and rates[max(0, warmup - 1)] == LR
    assert all(a >= b * (1 - 1e-15) for a, b in pairwise(rates[warmup:]))  # to an ulp, for min_lr = lr


def test_middle_of_linear_and_cosine_is_half_way():
    for decay in ("linear", "cosine"):
        assert curve(101, decay=decay, warmup_steps=0)[50] == pytest.approx((LR + MIN) / 2, rel=1e-15)
    assert curve(101, decay="cosine", warmup_steps=0)[25] == pytest.approx(MIN + (LR - MIN) * (2 + math.sqrt(2)) / 4, rel=1e-15)


def test_wsd_is_flat_then_falls_for_decay_steps():
    rates = curve(100, decay="wsd", decay_steps=20)
    assert rates[9:80] == [LR] * 71  # step 79 is the last at lr: 20 steps lower it
    assert rates[80] == pytest.approx(LR - (LR - MIN) / 20, rel=1e-15) and rates[99] == MIN
    with pytest.raises(Mistake, match="optimizer.decay_steps"):
        curve(100, decay="wsd")


def test_wsd_decay_longer_than_the_run_starts_at_the_peak():
    rates = curve(30, decay="wsd", decay_steps=500)
    assert rates == pytest.approx(curve(30, decay="linear"), rel=1e-15)


def test_inverse_sqrt_quarters_and_stops_at_the_floor():
    rates = curve(5000, decay="inverse_sqrt")
    assert rates[39] == pytest.approx(LR / 2) and rates[159] == pytest.approx(LR / 4)
    assert rates[-1] == MIN
    assert learning_rate(3, optimizer("inverse_sqrt", warmup_steps=0), 10) == pytest.approx(LR / 2)


def test_constant_ignores_min_lr_and_a_late_step_keeps_the_last_rate():
    assert curve(50, decay="constant")[9:] == [LR] * 41
    assert learning_rate(200, optimizer("cosine"), 50) == MIN


@pytest.mark.parametrize("decay", DECAYS)
def test_a_run_shorter_than_its_warm_up_only_warms_up(decay):
    assert curve(5, decay=decay, decay_steps=2) == pytest.approx([LR * (i + 1) / 10 for i in range(5)])
    assert curve(1, decay=decay, warmup_steps=0, decay_steps=1) == [LR]


def test_an_experiment_s_own_decay_follows_the_warm_up():
    own = {"halves": lambda step, optimizer, steps: optimizer.lr * 0.5 ** (step - optimizer.warmup_steps + 1)}
    rates = [learning_rate(step, optimizer("variant:halves"), 14, own) for step in range(16)]
    assert rates[:10] == curve(14, decay="cosine")[:10]
    assert rates[10:] == [LR / 2, LR / 4, LR / 8, LR / 16, LR / 16, LR / 16]  # steps past the last get the last one's rate


def test_the_decays_are_what_the_schema_allows():
    assert tuple(DECAYS) == schema.DECAYS


def theirs(build, steps: int) -> list[float]:
    """The rates of a transformers scheduler at its steps 1 .. steps."""
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler, rates = build(inner), []
    for _ in range(steps):
        inner.step()
        scheduler.step()
        rates.append(inner.param_groups[0]["lr"])
    return rates


THEIRS = {
    "constant": lambda o, w, t: transformers.get_constant_schedule_with_warmup(o, w),
    "linear": lambda o, w, t: transformers.get_linear_schedule_with_warmup(o, w, t),
    "cosine": lambda o, w, t: transformers.get_cosine_schedule_with_warmup(o, w, t),
    "wsd": lambda o, w, t: transformers.get_wsd_schedule(o, w, 25, num_training_steps=t, decay_type="linear"),
    "inverse_sqrt": lambda o, w, t: transformers.get_inverse_sqrt_schedule(o, w),
}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("warmup, steps", [(10, 100), (1, 77), (30, 60)])
def test_equals_transformers_one_step_on(decay, warmup, steps):
    ours = curve(steps, decay=decay, warmup_steps=warmup, min_lr=0.0, decay_steps=25)
    assert ours == pytest.approx(theirs(lambda o: THEIRS[decay](o, warmup, steps), steps), rel=1e-12, abs=1e-18)
