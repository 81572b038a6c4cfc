"""The description of a step that went wrong: written, read again, and refused where it is somebody's nonsense."""

import math
import random

import pytest

from parallel.errors import Mistake
from research.tracking.run_folder import RunFolder, create
from research.training import anomalies
from research.training.anomalies import LEAST, WINDOW, Incident, Spikes, Suspect

ONE = Incident(
    step=5,
    kind="non_finite",
    loss="nan",
    grad_norm="inf",
    samples=(32, 40),
    windows=[3, 1, 4],
    checkpoint="step_000003",
    suspects=[Suspect(1, "data 1", ["a.weight", "b.weight"])],
)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return create(tmp_path, "x")


def test_written_and_read_again(folder: RunFolder) -> None:
    anomalies.keep(folder, ONE)
    assert anomalies.load(folder, 5) == ONE
    assert ONE.said == "step 5: the loss is nan; rank 1 (data 1): a.weight and 1 more"


def test_a_step_without_one_lists_those_there_are(folder: RunFolder) -> None:
    with pytest.raises(Mistake, match="no incident at step 5 → the run had no incident"):
        anomalies.load(folder, 5)
    anomalies.keep(folder, ONE)
    with pytest.raises(Mistake, match="there are incidents at 5"):
        anomalies.load(folder, 6)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"suspects": 3, "samples": [1, 2]}', '{"suspects": [], "samples": ["a", 2], "step": 1}'])
def test_nonsense_is_a_sentence(folder: RunFolder, text: str) -> None:
    anomalies.keep(folder, ONE)
    anomalies.path_of(folder, 5).write_text(text)
    with pytest.raises(Mistake, match="does not describe a step"):
        anomalies.load(folder, 5)


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
