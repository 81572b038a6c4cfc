"""The number of samples of each step, constant or ramped up, as a function of the step alone: a run's position is still one integer."""

import math
from bisect import bisect_right
from fractions import Fraction
from operator import attrgetter
from typing import NamedTuple

from parallel.errors import Mistake


class Phase(NamedTuple):
    """Steps with the same number of samples: from step `step` on, which begins with the run's sample number `sample`."""

    step: int
    sample: int
    size: int


class BatchSizes:
    """How many samples each step has, and how many all steps before it.

    With a ramp (start, increment, samples), as `--rampup-batch-size` of Megatron-LM: the first step has `start` samples, and each
    step as many as start + increment · ⌊c / p⌋ up to `size`, where c are the samples before it and p = samples / number of increments.
    """

    def __init__(self, size: int, ramp: tuple[int, int, int] | None = None) -> None:
        """Raises a Mistake if the increments do not lead from the start to `size`."""
        self.size, self.phases = size, [Phase(0, 0, size)]
        if ramp is None:
            return
        start, increment, samples = ramp
        if start >= size or (size - start) % increment:
            raise Mistake(
                f"schedule.batch_ramp = {start} {increment} {samples} does not lead to schedule.batch_size = {size}: {size} − {start} = "
                f"{size - start} is no positive multiple of {increment} → use a start such as {size % increment or increment}"
            )
        increments = (size - start) // increment
        self.phases, step, sample = [], 0, 0
        for i in range(increments):
            border = Fraction(samples * (i + 1), increments)
            if sample < border:
                phase = Phase(step, sample, start + increment * i)
                steps = math.ceil((border - sample) / phase.size)
                self.phases.append(phase)
                step, sample = step + steps, sample + steps * phase.size
        self.phases.append(Phase(step, sample, size))

    @property
    def sizes(self) -> list[int]:
        """The sizes that steps have, the smallest first."""
        return [phase.size for phase in self.phases]

    def of(self, step: int) -> int:
        """The samples of a step, counted from 0."""
        return self._phase(step).size

    def before(self, step: int) -> int:
        """The samples of all steps before `step`, which is the number of its first sample."""
        phase = self._phase(step)
        return phase.sample + (step - phase.step) * phase.size

    def step_from(self, sample: int) -> int:
        """The first step that begins with `sample` or a later one."""
        phase = self.phases[bisect_right(self.phases, sample, key=attrgetter("sample")) - 1]
        return phase.step - (phase.sample - sample) // phase.size

    def _phase(self, step: int) -> Phase:
        return self.phases[bisect_right(self.phases, step, key=attrgetter("step")) - 1]
