"""The clock of a run, by a clock that the test moves."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from research.cluster import memory as memory_module
from research.cluster.memory import HostMemory, resident
from research.tracking import metrics
from research.training.meter import Meter, gpu_memory

EVERY = {"validation": 25}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock: Clock) -> Meter:
    found = Meter(clock)
    clock.now += 50.0  # building the engine is not training
    found.start()
    return found


def take(meter: Meter, clock: Clock, *losses: float, seconds: float = 2.0) -> None:
    for loss in losses:
        clock.now += seconds
        meter.step(loss, 512)


def test_an_interval_is_the_mean_of_its_steps(meter: Meter, clock: Clock) -> None:
    take(meter, clock, 5.0, 4.0, 3.0)
    interval = meter.interval()
    assert interval.loss == 4.0
    assert interval.tokens_per_second == pytest.approx(3 * 512 / 6.0)
    assert interval.step_ms == pytest.approx(2000.0) and interval.data_ms == 0.0


def test_the_next_interval_starts_anew(meter: Meter, clock: Clock) -> None:
    take(meter, clock, 9.0, 9.0)
    meter.interval()
    take(meter, clock, 2.0, seconds=0.5)
    interval = meter.interval()
    assert interval.loss == 2.0
    assert interval.tokens_per_second == pytest.approx(512 / 0.5)


def test_evaluation_is_no_training_time_but_passes(meter: Meter, clock: Clock) -> None:
    take(meter, clock, 1.0, 1.0)
    with meter.paused("validation"):
        clock.now += 100.0
    take(meter, clock, 1.0)
    interval = meter.interval()
    assert interval.tokens_per_second == pytest.approx(3 * 512 / 6.0) and interval.step_ms == pytest.approx(2000.0)
    assert meter.seconds() == 106.0
    take(meter, clock, 1.0)
    assert meter.interval().tokens_per_second == pytest.approx(512 / 2.0), "a pause counts in its own interval only"


def test_what_is_left_are_steps_and_evaluations(meter: Meter, clock: Clock) -> None:
    """100 steps, an evaluation every 25: after 30 steps, 70 steps and 3 evaluations."""
    take(meter, clock, *[1.0] * 25)
    assert meter.seconds_left(25, 100, 75 * 512, EVERY) == pytest.approx(75 * 2.0), "no evaluation has been timed yet"
    with meter.paused("validation"):
        clock.now += 10.0
    take(meter, clock, *[1.0] * 5)
    assert meter.seconds_left(30, 100, 70 * 512, EVERY) == pytest.approx(70 * 2.0 + 3 * 10.0)


def test_steps_to_come_that_have_more_tokens_take_longer(meter: Meter, clock: Clock) -> None:
    """10 steps of 512 tokens in 20 seconds, as at the beginning of a ramp, then 90 of 2,048."""
    take(meter, clock, *[1.0] * 10)
    assert meter.seconds_left(10, 100, 90 * 2048, {}) == pytest.approx(90 * 4 * 2.0)


def test_before_the_evaluation_of_this_very_step_it_is_still_left(meter: Meter, clock: Clock) -> None:
    """The row of step 50 is written before that step's evaluation."""
    take(meter, clock, *[1.0] * 25)
    with meter.paused("validation"):
        clock.now += 10.0
    take(meter, clock, *[1.0] * 25)
    assert meter.seconds_left(50, 100, 50 * 512, EVERY) == pytest.approx(50 * 2.0 + 3 * 10.0)


def test_at_the_end_nothing_is_left_but_the_last_evaluation(meter: Meter, clock: Clock) -> None:
    take(meter, clock, *[1.0] * 50)
    with meter.paused("validation"):
        clock.now += 10.0
    take(meter, clock, *[1.0] * 50)
    assert meter.seconds_left(100, 100, 0 * 512, EVERY) == pytest.approx(10.0)


def test_only_at_the_end_means_one_evaluation(meter: Meter, clock: Clock) -> None:
    """Its duration is unknown before it has happened once."""
    take(meter, clock, *[1.0] * 10)
    assert meter.seconds_left(10, 100, 90 * 512, {"validation": 0}) == pytest.approx(90 * 2.0)


def test_each_kind_of_pause_has_its_own_interval_and_duration(meter: Meter, clock: Clock) -> None:
    """Validations of 10 seconds every 25 steps, samples of 1 second every 10: after 50 steps 2 and 5 are left."""
    for step in range(1, 51):
        take(meter, clock, 1.0)
        for what, every, seconds in (("validation", 25, 10.0), ("samples", 10, 1.0)):
            if step % every == 0:
                with meter.paused(what):
                    clock.now += seconds
    take(meter, clock, 1.0)
    every = {"validation": 25, "samples": 10, "never timed": 1}
    assert meter.seconds_left(51, 100, 49 * 512, every) == pytest.approx(49 * 2.0 + 2 * 10.0 + 5 * 1.0)


@pytest.mark.parametrize(("loss", "perplexity"), [(1000.0, math.inf), (math.nan, math.nan), (math.inf, math.inf)])
def test_a_loss_that_overflows_is_written_not_raised(loss: float, perplexity: float, meter: Meter, clock: Clock) -> None:
    take(meter, clock, loss)
    interval = meter.interval()
    assert metrics.perplexity(interval.loss) == pytest.approx(perplexity, nan_ok=True)
    assert interval.tokens_per_second > 0


def test_the_time_until_a_batch_is_there_is_time_spent_on_data(meter: Meter, clock: Clock) -> None:
    """Two steps of three micro-batches, each 0.1 s in the making and 0.4 s in the engine; nothing is read ahead."""

    def batches() -> Iterator[int]:
        for number in range(3):
            clock.now += 0.1
            yield number
        clock.now += 0.1  # after the last one

    for _ in range(2):
        seen = []
        for number in meter.waited_for(batches()):
            seen.append(number)
            clock.now += 0.4
        assert seen == [0, 1, 2]
        meter.step(1.0, 512)
    interval = meter.interval()
    assert interval.step_ms == pytest.approx(1600.0) and interval.data_ms == pytest.approx(400.0)
    take(meter, clock, 1.0)
    assert meter.interval().data_ms == 0.0, "it belongs to its own interval only"


def test_what_the_run_adds_is_told_from_what_was_there_before() -> None:
    """120 MB before, which have gone again, count neither as added nor as its peak; 80 MB in between count in the peak only."""
    gone = bytearray(120_000_000)
    del gone
    memory = HostMemory()
    kept = bytearray(30_000_000)
    brief = bytearray(80_000_000)
    del brief
    row = memory.row()
    assert row["mem/host_mb"] == pytest.approx(resident().now, abs=5)
    assert row["mem/host_added_mb"] == pytest.approx(30, abs=10)
    assert row["mem/host_added_peak_mb"] == pytest.approx(110, abs=10)
    assert memory.peak() >= row["mem/host_mb"] and memory.peak() >= memory.before + 105
    del kept
    assert memory.row()["mem/host_added_mb"] == pytest.approx(0, abs=10)
    assert memory.row()["mem/host_added_peak_mb"] == pytest.approx(110, abs=10), "a peak stays"


def test_where_the_kernel_resets_no_peak_the_largest_reading_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark is then the peak of the whole process, of which only what exceeds it says anything about the run."""
    readings = iter([(500.0, 900.0), (500.0, 900.0), (560.0, 900.0), (520.0, 900.0), (530.0, 980.0)])
    monkeypatch.setattr(memory_module, "resident", lambda: memory_module.Resident(*next(readings)))
    monkeypatch.setattr(memory_module, "CLEAR", Path("/nowhere/clear_refs"))
    memory = HostMemory()
    peaks = [memory.row()["mem/host_added_peak_mb"] for _ in range(3)]
    assert peaks == [60.0, 60.0, 480.0]


def test_memory_figures_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_memory() == {}  # a CPU has none
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": 3})
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 5e9)
    assert gpu_memory() == {"perf/memory_reserved_mb": 5000.0, "perf/memory_retries": 3.0, "perf/memory_ooms": 0.0}
