"""Lists the layouts that `verify` runs, and shrinks an experiment to sizes that fit all of them.

A layout is a grid of ranks together with a ZeRO stage, sequence parallelism, gradient accumulation and activation recomputation.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from models.config import GPT
from research.config import Experiment, serialization
from research.config.checks import kv_heads_fit

BATCH, LENGTH, HEAD_SIZE, VOCABULARY = 16, 16, 8, 83
"""Sizes of the shrunk experiment. 8 data ranks divide the batch; no tensor degree divides the vocabulary."""
STAGES, SEQUENCES, RECOMPUTES, ACCUMULATIONS = (1, 2, 3), (False, True), ("none", "selective", "full"), (1, 2)


@dataclass(frozen=True)
class LayoutCase:
    """One layout to verify: the sizes of the three axes, and what is done along them."""

    pipe: int = 1
    data: int = 1
    tensor: int = 1
    zero_stage: int = 1
    sequence: bool = False
    recompute: str = "none"
    accumulated: int = 1
    """Micro-batches per step on each data rank."""

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.pipe * self.data * self.tensor

    @property
    def micro_batch(self) -> int:
        """Samples per micro-batch."""
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
    """Up to three layouts per grid, such that every setting occurs at least once together with every axis larger than 1."""
    cases = []
    for pipe, data, tensor in grids(world):
        for i in range(3 if world > 1 else 1):
            stage = 1 if pipe > 1 else STAGES[i]
            sequence = tensor > 1 and SEQUENCES[i % 2]
            cases.append(LayoutCase(pipe, data, tensor, stage, sequence, RECOMPUTES[i], ACCUMULATIONS[(i + 1) % 2]))
    return cases


def full(world: int) -> list[LayoutCase]:
    """Every combination of grid and settings. Impossible ones are included: they are listed with the reason (see `why_not`)."""
    return [
        LayoutCase(*grid, stage, sequence, recompute, accumulated)
        for grid in grids(world)
        for stage, sequence, recompute, accumulated in product(STAGES, SEQUENCES, RECOMPUTES, ACCUMULATIONS)
        if grid[2] > 1 or not sequence
    ]


def why_not(case: LayoutCase, experiment: Experiment) -> str | None:
    """The reason why the experiment cannot run on this layout; None if it can."""
    if case.pipe > 1 and case.zero_stage > 1:
        return f"ZeRO-{case.zero_stage} does not work with a pipeline"
    if experiment.model.num_heads % case.tensor:
        return f"tensor {case.tensor} does not divide num_heads = {experiment.model.num_heads}"
    if not kv_heads_fit(experiment.model, case.tensor):
        return f"tensor {case.tensor} does not fit num_kv_heads = {experiment.model.num_kv_heads}"
    return None


def shrunk(experiment: Experiment, ranks: int) -> Experiment:
    """The experiment with its own structure and small sizes that every grid of up to `ranks` ranks divides, in fp32, with Adam's eps 1e-3.

    The eps is large because some gradients are zero in theory (a key bias without rotary positions): with a small eps, Adam would turn
    their rounding noise into full steps.
    """
    model = experiment.model
    groups = model.num_heads // model.num_kv_heads
    # Grouped queries: fewer kv heads than the largest tensor degree, so that ranks share one.
    kv_heads = ranks if groups == 1 else max(1, min(model.num_kv_heads, ranks // 2))
    heads = math.lcm(groups * kv_heads, ranks)
    sizes: dict[str, Any] = {
        "num_layers": max(2, ranks),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "hidden_size": (hidden := hidden_size_of(model, heads)),
        "head_size": HEAD_SIZE,
        "ffn_size": nearest_multiple(model.ffn_size / model.hidden_size * hidden, ranks),
        "vocab_size": VOCABULARY,
        "seq_length": LENGTH,
    }
    settings = serialization.resolved(experiment)
    del settings["schema"]
    settings["model"] |= sizes
    settings["schedule"] |= {"batch_size": BATCH, "micro_batch_size": 1}
    settings["optimizer"] |= {"eps": 1e-3}
    return serialization.build(settings | {"precision": "fp32", "deepspeed": {}})


def hidden_size_of(model: GPT, heads: int) -> int:
    """The hidden size for `heads` heads of HEAD_SIZE features, in proportion to their sum as in `model`."""
    return nearest_multiple(model.hidden_size / (model.num_heads * model.head_size) * heads * HEAD_SIZE, 2)


def nearest_multiple(size: float, unit: int) -> int:
    """The multiple of `unit` that is nearest to `size`, at least `unit`."""
    return max(1, round(size / unit)) * unit
