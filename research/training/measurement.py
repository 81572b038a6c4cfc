"""Measurements of an experiment's own: `evaluate.measure` names a function of variant.py, whose numbers are logged on any layout.

`measure(step, model)` is called by every rank with the same arguments, and what it reads of the model is equal on every rank and
layout, up to rounding. It changes nothing in the training.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.inference.variant_check import UnusableLogits
from parallel.engines.engine import Engine
from parallel.errors import Mistake
from parallel.object_collectives import all_gather_objects
from parallel.slices import slice_of
from research.config.schema import MEASURE
from research.data.tokenizer import Tokenizer
from research.training.live_model import Live

Measure = Callable[[int, "MeasuredModel"], Mapping[str, Any]]


class MeasuredModel:
    """The model between two steps, as a measurement sees it. Every method is collective, and equal on every rank."""

    def __init__(self, live: Live, tokenizer: Tokenizer) -> None:
        self._live, self.tokenizer = live, tokenizer
        self._checked = False
        """Whether the logits are known to depend on earlier tokens alone."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(logical name, whole fp32 weight on the CPU) of every parameter, in the order of the layers, one at a time.

        Every tensor passes over the network once, so measure large models seldom.
        """
        engine, grid = self._live.engine, self._live.engine.grid
        own = [(name, slice_of(parameter).shape) for name, parameter in engine.parameters.items() if engine.owns(name)]
        by_stage = dict(all_gather_objects((grid.pipe_rank, own), grid))
        for stage in range(grid.pipe):
            weights = engine.full_weights() if stage == grid.pipe_rank else None
            for name, shape in by_stage[stage]:
                weight = torch.empty(shape) if weights is None else next(weights)[1]
                yield name, _broadcast_from(stage, weight, engine)

    def log_probabilities(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """For each sequence of at least two ids, the natural log-probability of every id but the first, given all ids before it.

        Raises UnusableLogits if classes of a variant.py let them depend on anything else: they would then measure the padding.
        """
        if not self._checked:
            self._live.refuse_dependent_logits()
            self._checked = True
        scores: list[list[float]] = []
        for ids in sequences:
            scores += [found for found, _ in self._live.scores([ids])]
        return scores


def _broadcast_from(stage: int, weight: Tensor, engine: Engine) -> Tensor:
    """The `weight` of pipeline stage `stage`, on the CPU of every rank. Collective over the pipe group."""
    group = engine.grid.pipe_group
    if group is None:
        return weight
    here = weight.to(engine.device)
    dist.broadcast(here, src=dist.get_process_group_ranks(group)[stage], group=group)
    return here.cpu()


def measured_row(measure: Measure, step: int, model: MeasuredModel) -> dict[str, float]:
    """{'measure/NAME': number} of what `measure` returns. A Mistake if it raises, or returns anything but numbers by name.

    UnusableLogits passes: it is the model that cannot be measured like this, not the function that is wrong.
    """
    try:
        found = measure(step, model)
    except UnusableLogits:
        raise
    except Exception as error:
        raise Mistake(f"{MEASURE} failed at step {step}: {type(error).__name__}: {' '.join(str(error).split())} → correct it") from error
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise Mistake(f"{MEASURE} returned {found!r:.80} at step {step} → return a dict of numbers by name")
    row: dict[str, float] = {}
    for name, value in found.items():
        try:
            row[f"measure/{name}"] = float(value)
        except (TypeError, ValueError):
            raise Mistake(f"{MEASURE} returned {value!r:.80} for {name!r} at step {step} → return one number for each name") from None
    return row
