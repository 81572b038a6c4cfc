"""The number of samples of each step, constant or ramped up, as a function of the step alone: a run's position is still one integer."""

import math
from bisect import bisect_right
from fractions import Fraction
from operator import attrgetter
from typing import NamedTuple

from parallel.errors import Mistake

MOST = 2**16
"""The most increments of a ramp: each is an entry of a list."""
Ramp = tuple[int, int, int]
"""start, increment, samples."""


def increments_of(ramp: Ramp, ramp_name: str, end: int, end_name: str) -> int:
    """How many increments lead from the start of a ramp to its end. Raises a Mistake if they miss it, or are more than MOST."""
    start, increment, _ = ramp
    said = f"{ramp_name} = {' '.join(map(str, ramp))}"
    if start >= end or (end - start) % increment:
        raise Mistake(
            f"{said} does not lead to {end_name} = {end}: {end} − {start} = {end - start} is no positive multiple of {increment} → "
            f"use a start such as {end % increment or increment}"
        )
    if (increments := (end - start) // increment) > MOST:
        raise Mistake(f"{said} needs {increments:,} increments to {end_name} = {end}, the most are {MOST:,} → use a larger increment")
    return increments


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

    def __init__(self, size: int, ramp: Ramp | None = None) -> None:
        """Raises a Mistake if the increments do not lead from the start to `size`."""
        self.size, self.phases = size, [Phase(0, 0, size)]
        if ramp is None:
            return
        start, increment, samples = ramp
        increments = increments_of(ramp, "schedule.batch_ramp", size, "schedule.batch_size")
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
