"""The number of samples of each step, against a run that counts samples one step after the other, as Megatron-LM does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import Mistake
from research.config.batch_sizes import BatchSizes


def counted(size: int, ramp: tuple[int, int, int], steps: int) -> list[int]:
    """Megatron-LM's rule (num_microbatches_calculator.py), applied to the samples that were consumed so far."""
    start, increment, samples = ramp
    per_increment = samples / ((size - start) // increment)
    consumed, found = 0, []
    for _ in range(steps):
        now = size if consumed > samples else min(size, start + int(consumed / per_increment) * increment)
        found.append(now)
        consumed += now
    return found


@given(st.integers(1, 40), st.integers(1, 16), st.integers(1, 12), st.integers(1, 4000))
def test_a_ramp_is_that_of_counting_samples(start: int, increment: int, increments: int, samples: int) -> None:
    size = start + increment * increments
    sizes = BatchSizes(size, (start, increment, samples * increments))  # so that Megatron-LM's division is exact
    found = [sizes.of(step) for step in range(120)]
    assert found == counted(size, (start, increment, samples * increments), 120)
    assert [sizes.before(step) for step in range(121)] == [sum(found[:step]) for step in range(121)]
    assert set(found) <= set(sizes.sizes)


def test_without_a_ramp_all_steps_are_alike() -> None:
    sizes = BatchSizes(24)
    assert (sizes.of(0), sizes.of(10**9), sizes.before(0), sizes.before(10**9), sizes.sizes) == (24, 24, 0, 24 * 10**9, [24])


def test_an_example() -> None:
    """32 sequences, from 8 by 8 over 96 samples: 4 steps of 8, 2 of 16, 2 of 24 (the border of 96 lies in the second), then 32."""
    sizes = BatchSizes(32, (8, 8, 96))
    assert [sizes.of(step) for step in range(10)] == [8, 8, 8, 8, 16, 16, 24, 24, 32, 32]


@pytest.mark.parametrize(
    ("ramp", "said"),
    [
        (
            (8, 5, 100),
            "schedule.batch_ramp = 8 5 100 does not lead to schedule.batch_size = 32: 32 − 8 = 24 is no positive multiple of 5 →",
        ),
        ((32, 8, 100), "32 − 32 = 0 is no positive multiple of 8 → use a start such as 8"),
        ((40, 8, 100), "32 − 40 = -8 is no positive multiple of 8"),
    ],
)
def test_a_ramp_that_does_not_lead_to_the_size_is_a_sentence(ramp: tuple[int, int, int], said: str) -> None:
    with pytest.raises(Mistake, match=said.replace(".", r"\.")):
        BatchSizes(32, ramp)
