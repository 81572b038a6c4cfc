"""The layouts that `verify` runs: every grid of a world, with every ZeRO stage, sequence parallelism, accumulation, recomputation."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from research.config import Experiment, serialization
from research.config.checks import kv_heads_fit

BATCH, LENGTH, HEAD_SIZE, VOCABULARY = 16, 16, 8, 83
"""Of the shrunk experiment: a batch that 8 data ranks divide, a vocabulary that no tensor degree does."""
STAGES, SEQUENCES, RECOMPUTES, ACCUMULATIONS = (1, 2, 3), (False, True), ("none", "selective", "full"), (1, 2)


@dataclass(frozen=True)
class LayoutCase:
    """One layout: the grid, and what is done along its axes."""

    pipe: int = 1
    data: int = 1
    tensor: int = 1
    zero_stage: int = 1
    sequence: bool = False
    recompute: str = "none"
    accumulated: int = 1

    @property
    def world(self) -> int:
        """Ranks."""
        return self.pipe * self.data * self.tensor

    @property
    def micro_batch(self) -> int:
        """Samples of one pass of a data rank."""
        return BATCH // self.data // self.accumulated

    def __str__(self) -> str:
        words = [f"pipe {self.pipe} × data {self.data} × tensor {self.tensor}", f"ZeRO-{self.zero_stage}"]
        words += ["sequence"] * self.sequence + [f"{self.recompute} recomputation"] * (self.recompute != "none")
        return " · ".join([*words, f"{self.accumulated} accumulated"])


def grids(world: int) -> Iterator[tuple[int, int, int]]:
    """All (pipe, data, tensor) whose product is `world`."""
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    return ((p, d, t) for p, d, t in product(sizes, repeat=3) if p * d * t == world)


def pairwise(world: int) -> list[LayoutCase]:
    """A few cuts of each grid in which each way of running stands at least once beside each axis > 1."""
    return [_dealt(*grid, i) for grid in grids(world) for i in range(3 if world > 1 else 1)]


def _dealt(pipe: int, data: int, tensor: int, i: int) -> LayoutCase:
    stage = 1 if pipe > 1 else STAGES[i]
    sequence = tensor > 1 and SEQUENCES[i % 2]
    return LayoutCase(pipe, data, tensor, stage, sequence, RECOMPUTES[i], ACCUMULATIONS[(i + 1) % 2])


def full(world: int) -> list[LayoutCase]:
    """The whole product, impossible ones included: they are listed with the reason."""
    return [
        LayoutCase(*grid, stage, sequence, recompute, accumulated)
        for grid in grids(world)
        for stage, sequence, recompute, accumulated in product(STAGES, SEQUENCES, RECOMPUTES, ACCUMULATIONS)
        if grid[2] > 1 or not sequence
    ]


def why_not(cut: LayoutCase, experiment: Experiment) -> str | None:
    """Why this cut cannot be; None where it can."""
    if cut.pipe > 1 and cut.zero_stage > 1:
        return f"ZeRO-{cut.zero_stage} does not work with a pipeline"
    if experiment.model.num_heads % cut.tensor:
        return f"tensor {cut.tensor} does not divide num_heads = {experiment.model.num_heads}"
    if not kv_heads_fit(experiment.model, cut.tensor):
        return f"tensor {cut.tensor} does not fit num_kv_heads = {experiment.model.num_kv_heads}"
    return None


def shrunk(experiment: Experiment, ranks: int) -> Experiment:
    """The experiment with its structure and small sizes, which grids of up to `ranks` ranks divide; fp32, Adam's eps 1e-3.

    eps: some gradients are zero in theory (a key bias without rotary), and Adam would turn their rounding noise into full steps.
    """
    model = experiment.model
    groups = model.num_heads // model.num_kv_heads
    kv_heads = ranks if groups == 1 else max(1, min(model.num_kv_heads, ranks // 2))  # grouped: fewer than the most tensor ranks
    heads = math.lcm(groups * kv_heads, ranks)
    sizes: dict[str, Any] = {
        "num_layers": max(2, ranks),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "hidden_size": heads * HEAD_SIZE,
        "ffn_size": nearest_multiple(model.ffn_size / model.hidden_size * heads * HEAD_SIZE, ranks),
        "vocab_size": VOCABULARY,
        "seq_length": LENGTH,
    }
    settings = serialization.resolved(experiment)
    del settings["schema"]
    settings["model"] |= sizes
    settings["schedule"] |= {"batch_size": BATCH, "micro_batch_size": 1}
    settings["optimizer"] |= {"eps": 1e-3}
    return serialization.build(settings | {"precision": "fp32", "deepspeed": {}})


def nearest_multiple(size: float, unit: int) -> int:
    """The multiple of `unit` nearest to `size`, at least `unit`."""
    return max(1, round(size / unit)) * unit
