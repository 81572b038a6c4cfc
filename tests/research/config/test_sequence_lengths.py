"""The tokens of each sample, against a run that counts samples one step after the other, and against DeepSpeed's curriculum."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import Mistake
from research.config.batch_sizes import BatchSizes
from research.config.sequence_lengths import SequenceLengths

STEPS = 100


def counted(length: int, ramp: tuple[int, int, int], sizes: list[int]) -> list[int]:
    """The length of each step by the rule, in whole numbers, applied to the samples that were consumed so far."""
    start, increment, samples = ramp
    consumed, found = 0, []
    for size in sizes:
        found.append(min(length, start + increment * (consumed * ((length - start) // increment) // samples)))
        consumed += size
    return found


@st.composite
def batch_sizes(draw: st.DrawFn) -> BatchSizes:
    """All steps alike, or ramped up."""
    start, increment, increments = draw(st.integers(1, 20)), draw(st.integers(1, 8)), draw(st.integers(0, 6))
    ramp = (start, increment, draw(st.integers(1, 1000))) if increments else None
    return BatchSizes(start + increment * increments, ramp)


@given(batch_sizes(), st.integers(1, 40), st.integers(1, 16), st.integers(1, 12), st.integers(1, 4000))
def test_a_ramp_is_that_of_counting_samples(batches: BatchSizes, start: int, increment: int, increments: int, samples: int) -> None:
    """The lengths of all samples, the tokens before each, that lengths only grow, and that the ramp ends at the whole length."""
    length = start + increment * increments
    lengths, sizes = SequenceLengths(length, batches, (start, increment, samples)), [batches.of(step) for step in range(STEPS)]
    found = counted(length, (start, increment, samples), sizes)
    of_samples = [one for one, size in zip(found, sizes, strict=True) for _ in range(size)]
    assert [lengths.of(sample) for sample in range(len(of_samples))] == of_samples == sorted(of_samples)
    tokens = 0
    for sample, one in enumerate(of_samples):
        assert lengths.before(sample) == tokens
        tokens += one
    assert lengths.before(len(of_samples)) == tokens == sum(one * size for one, size in zip(found, sizes, strict=True))
    assert set(found) <= set(lengths.lengths)
    last = lengths.phases[-1]
    assert last.length == length == lengths.of(10**12) and batches.before(last.step) == last.sample >= samples
    assert batches.before(last.step - 1) < samples, "the ramp ends with the first step that begins after it"


@given(batch_sizes(), st.integers(0, 2000))
def test_the_first_step_from_a_sample_on(batches: BatchSizes, sample: int) -> None:
    assert batches.step_from(sample) == next(step for step in range(2001) if batches.before(step) >= sample)


@pytest.mark.slow
@pytest.mark.parametrize(("start", "length", "step", "total"), [(8, 64, 8, 16), (64, 1024, 64, 32), (16, 2048, 16, 64), (24, 32, 8, 4)])
def test_it_is_deepspeed_s_fixed_linear_curriculum(start: int, length: int, step: int, total: int) -> None:
    """DeepSpeed counts steps where we count samples; its difficulty_step is our increment. Totals are powers of two: it uses floats."""
    from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

    schedule = {"total_curriculum_step": total, "difficulty_step": step}
    theirs = CurriculumScheduler(
        {"min_difficulty": start, "max_difficulty": length, "schedule_type": "fixed_linear", "schedule_config": schedule}
    )
    lengths = SequenceLengths(length, BatchSizes(4), (start, step, 4 * total))
    assert [lengths.of(4 * before) for before in range(2 * total)] == [theirs.get_difficulty(before) for before in range(2 * total)]


def test_without_a_ramp_all_samples_are_whole() -> None:
    lengths, many = SequenceLengths(128, BatchSizes(24)), 10**9
    assert (lengths.of(0), lengths.of(many), lengths.before(0), lengths.before(many)) == (128, 128, 0, 128 * many)
    assert lengths.lengths == [128]


def test_an_example() -> None:
    """Steps of 8 samples, from 4 tokens by 4 to 16 over 60: longer from the samples 20 and 40 on, whole from 60 on."""
    lengths = SequenceLengths(16, BatchSizes(8), (4, 4, 60))
    assert [lengths.of(8 * step) for step in range(10)] == [4, 4, 4, 8, 8, 12, 12, 12, 16, 16]
    assert (lengths.before(24), lengths.before(40), lengths.before(64), lengths.before(65)) == (96, 224, 512, 528)


def test_phases_that_no_step_begins_in_are_left_out_quickly() -> None:
    """A ramp by single tokens over fewer samples than a step has."""
    assert SequenceLengths(2**16 + 1, BatchSizes(1000), (1, 1, 999)).lengths == [1, 2**16 + 1]


def test_more_increments_than_anybody_means_are_refused_at_once() -> None:
    """A file of a stranger may have them."""
    most, said = 2**32 - 1, "needs 4,294,967,294 increments to {} = 4294967295, the most are 65,536 → use a larger increment"
    with pytest.raises(Mistake, match=said.format("schedule.batch_size")):
        BatchSizes(most, (1, 1, most))
    with pytest.raises(Mistake, match=said.format("model.seq_length")):
        SequenceLengths(most, BatchSizes(1), (1, 1, most))


@pytest.mark.parametrize(
    ("ramp", "said"),
    [
        (
            (8, 5, 100),
            "schedule.length_ramp = 8 5 100 does not lead to model.seq_length = 32: 32 − 8 = 24 is no positive multiple of 5 → "
            "use a start such as 2",
        ),
        ((32, 8, 100), "32 − 32 = 0 is no positive multiple of 8 → use a start such as 8"),
        ((40, 8, 100), "32 − 40 = -8 is no positive multiple of 8"),
    ],
)
def test_a_ramp_that_does_not_lead_to_the_length_is_a_sentence(ramp: tuple[int, int, int], said: str) -> None:
    with pytest.raises(Mistake, match=said.replace(".", r"\.")):
        SequenceLengths(32, BatchSizes(8), ramp)
