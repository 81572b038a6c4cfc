"""A spike is far above the last hundred losses; a new level is soon the usual one."""

import math
import random

from research.spikes import LEAST, WINDOW, Spikes


def losses(count: int, around: float = 3.0) -> list[float]:
    draw = random.Random(0)
    return [draw.gauss(around, 0.1) for _ in range(count)]


def test_a_loss_far_above_is_one_and_one_within_is_not() -> None:
    spikes = Spikes(6.0, losses(WINDOW))
    assert 3.4 < spikes.limit() < 3.8
    assert not spikes.is_one(3.3)
    assert spikes.is_one(9.0)
    assert not spikes.is_one(0.1)  # far below is welcome


def test_too_few_to_tell_or_not_asked_for() -> None:
    assert not Spikes(6.0, losses(LEAST - 1)).is_one(99.0)
    assert not Spikes(0.0, losses(WINDOW)).is_one(99.0)


def test_a_new_level_becomes_usual_and_what_is_not_finite_is_not_remembered() -> None:
    spikes = Spikes(6.0, losses(WINDOW))
    assert sum(spikes.is_one(loss) for loss in losses(WINDOW, around=5.0)) < 5
    assert not spikes.is_one(5.1) and len(spikes.recent) == WINDOW
    spikes.is_one(math.nan)
    assert all(math.isfinite(loss) for loss in spikes.recent)
