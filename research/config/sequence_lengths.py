"""The number of tokens of each sample that training reads, constant or ramped up, as a function of the sample's number alone."""

from bisect import bisect_right
from operator import attrgetter
from typing import NamedTuple

from research.config.batch_sizes import BatchSizes, Ramp, increments_of


class Phase(NamedTuple):
    """Steps with samples of the same length: from step `step` on, which begins with the run's sample number `sample`."""

    step: int
    sample: int
    tokens: int
    """Of all samples before `sample`."""
    length: int


class SequenceLengths:
    """How many tokens each sample has, and how many all samples before it.

    With a ramp (start, increment, samples), as in sequence length warm-up (arXiv:2108.06084; `fixed_linear` of DeepSpeed's curriculum):
    all samples of a step have start + increment · ⌊c / p⌋ tokens, up to `length`, where c are the samples before the step and
    p = samples / number of increments. These are the first tokens of a window of `length`; the rest of it is not read.
    """

    def __init__(self, length: int, batch_sizes: BatchSizes, ramp: Ramp | None = None) -> None:
        """`batch_sizes`: where steps begin. Raises a Mistake if the increments do not lead from the start to `length`."""
        self.phases = [Phase(0, 0, 0, length)]
        if ramp is None:
            return
        start, increment, samples = ramp
        increments = increments_of(ramp, "schedule.length_ramp", length, "model.seq_length")
        self.phases = [Phase(0, 0, 0, start)]
        while (last := self.phases[-1]).length < length:
            border = -(-samples * (last.sample * increments // samples + 1) // increments)  # the sample from which on they are longer
            step = batch_sizes.step_from(border)
            sample = batch_sizes.before(step)
            longer = start + increment * min(sample * increments // samples, increments)
            self.phases.append(Phase(step, sample, last.tokens + (sample - last.sample) * last.length, longer))

    @property
    def lengths(self) -> list[int]:
        """The lengths that samples have, the shortest first."""
        return [phase.length for phase in self.phases]

    def of(self, sample: int) -> int:
        """The tokens of a sample, by its number in the run."""
        return self._phase(sample).length

    def before(self, sample: int) -> int:
        """The tokens of all samples before `sample`."""
        phase = self._phase(sample)
        return phase.tokens + (sample - phase.sample) * phase.length

    def _phase(self, sample: int) -> Phase:
        return self.phases[bisect_right(self.phases, sample, key=attrgetter("sample")) - 1]
