"""Lists the layouts that `verify` runs, and shrinks an experiment to sizes that fit all of them.

A layout is a grid of ranks together with a ZeRO stage, sequence parallelism, gradient accumulation and activation recomputation.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from models.encoder_config import T5, AnyModel
from parallel.engines.deepspeed_config import OWNED, SAME
from research.config import Experiment, serialization
from research.config.checks import kv_heads_fit
from research.tracking import format as fmt

BATCH, LENGTH, SOURCE_LENGTH, HEAD_SIZE, VOCABULARY = 16, 16, 8, 8, 83
"""Sizes of the shrunk experiment. 8 data ranks divide the batch; no tensor degree divides the vocabulary."""
STAGES, SEQUENCES, RECOMPUTES = (1, 2, 3), (False, True), ("none", "selective", "full")
LEAST = 0.1
"""The least weight decay and label smoothing: an experiment without them would not notice that an engine leaves them out."""
OPTIMIZER = {"lr": 1e-2, "min_lr": 2.5e-3, "warmup_steps": 2, "eps": 1e-3}
"""A few steps change the weights by much, each at another learning rate. With a small eps, Adam would turn the rounding noise of gradients
that are zero in theory (a key bias without rotary positions) into full steps."""
LOGITS_AT_ONCE, BUCKET_ELEMENTS = 500, 1000
"""Sizes so small that the cross entropy has several blocks of rows, and the engines several buckets and parameters larger than a bucket."""
ZERO_3 = {
    "sub_group_size": 1000,
    "stage3_param_persistence_threshold": 40,
    "stage3_prefetch_bucket_size": 1000,
    "stage3_max_live_parameters": 4000,
    "stage3_max_reuse_distance": 1000,
}
"""The same for ZeRO-3: only the smallest parameters stay gathered, and the optimizer updates the others in several groups."""
CHANGED_KEYS = {
    *SAME,
    *OWNED,
    *(f"zero_optimization.{name}" for name in ("reduce_bucket_size", "allgather_bucket_size", "overlap_comm", "contiguous_gradients")),
}
"""Keys of the DeepSpeed configuration whose derived value differs here, by the sizes above, by layout or because ranks run on the CPU. An
experiment's own table may repeat the value derived for its training, which would contradict the one derived here."""


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
        shown = fmt.layout(self.pipe, self.data, self.tensor, self.zero_stage, sequence=self.sequence, recompute=self.recompute)
        return f"{shown} · {self.accumulated} accumulated"


def grids(world: int) -> Iterator[tuple[int, int, int]]:
    """All (pipe, data, tensor) whose product is `world`."""
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    return ((p, d, t) for p, d, t in product(sizes, repeat=3) if p * d * t == world)


def accumulations(pipe: int) -> tuple[int, int]:
    """Micro-batches per step: one, or several. Twice as many as stages, so that a pipeline uses each of its buffers more than once."""
    return 1, 2 * pipe


def pairwise(world: int) -> list[LayoutCase]:
    """Up to three layouts per grid, such that every setting occurs at least once together with every axis larger than 1."""
    cases = []
    for pipe, data, tensor in grids(world):
        for i in range(3 if world > 1 else 1):
            stage = 1 if pipe > 1 else STAGES[i]
            sequence = tensor > 1 and SEQUENCES[i % 2]
            cases.append(LayoutCase(pipe, data, tensor, stage, sequence, RECOMPUTES[i], accumulations(pipe)[(i + 1) % 2]))
    return cases


def full(world: int) -> list[LayoutCase]:
    """Every combination of grid and settings. Impossible ones are included: they are listed with the reason (see `why_not`)."""
    return [
        LayoutCase(*grid, stage, sequence, recompute, accumulated)
        for grid in grids(world)
        for stage, sequence, recompute, accumulated in product(STAGES, SEQUENCES, RECOMPUTES, accumulations(grid[0]))
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


def shrunk(experiment: Experiment, ranks: int, steps: int = 3) -> Experiment:
    """The experiment with its own structure and small sizes that every grid of up to `ranks` ranks divides, in fp32, for `steps` steps.

    Warm-up, weight decay and label smoothing are such that each changes the result. `training.binding_clip` finds a clip that does.
    """
    model = experiment.model
    groups = model.num_heads // model.num_kv_heads
    # Several heads on each of two tensor ranks. Grouped queries: two kv heads at least, which two tensor ranks divide, and fewer than the
    # largest degree from four on, so that ranks share one.
    fewest = 2 ** int(math.log2(min(model.num_kv_heads, max(2, ranks // 2))))
    kv_heads = ranks * max(1, 4 // ranks) if groups == 1 else fewest
    heads = math.lcm(groups * kv_heads, ranks)
    sizes: dict[str, Any] = {
        # of two stacks, the encoder is deeper by one block, so that a pipeline is cut beside their border
        "num_layers": max(2, ranks // 2 if isinstance(model, T5) else ranks),
        "num_encoder_layers": max(2, ranks // 2) + 1,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "hidden_size": (hidden := hidden_size_of(model, heads)),
        "head_size": HEAD_SIZE,
        "ffn_size": nearest_multiple(model.ffn_size / model.hidden_size * hidden, ranks),
        "vocab_size": VOCABULARY,
        "seq_length": LENGTH,
        "source_length": SOURCE_LENGTH,
    }
    settings = serialization.resolved(experiment)
    del settings["schema"]
    settings["model"] |= of_fields(model, sizes)
    # Two steps more than are taken: the learning rate has not reached the end of its decay.
    settings["schedule"] |= {"steps": steps + 2, "batch_size": BATCH, "micro_batch_size": 1}
    own = experiment.optimizer
    settings["optimizer"] |= OPTIMIZER | {"weight_decay": max(LEAST, own.weight_decay), "label_smoothing": max(LEAST, own.label_smoothing)}
    settings["optimizer"] |= {"decay_steps": steps} if own.decay == "wsd" else {}

    deepspeed = without_keys(experiment.deepspeed, CHANGED_KEYS)
    deepspeed["zero_optimization"] = deepspeed.get("zero_optimization", {}) | ZERO_3
    return serialization.build(settings | {"precision": "fp32", "deepspeed": deepspeed})


def of_fields(model: AnyModel, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the sizes that are settings of this kind of model."""
    return {name: size for name, size in sizes.items() if name in type(model).model_fields}


def without_keys(table: Mapping[str, Any], keys: Collection[str], path: str = "") -> dict[str, Any]:
    """The table without `keys`, which are dotted as in "zero_optimization.stage", and without tables of which nothing is left."""
    kept: dict[str, Any] = {}
    for key, value in table.items():
        inner = without_keys(value, keys, f"{path}{key}.") if isinstance(value, Mapping) else value
        if f"{path}{key}" not in keys and inner != {}:
            kept[key] = inner
    return kept


def hidden_size_of(model: AnyModel, heads: int) -> int:
    """The hidden size for `heads` heads of HEAD_SIZE features, in proportion to their sum as in `model`."""
    return nearest_multiple(model.hidden_size / (model.num_heads * model.head_size) * heads * HEAD_SIZE, 2)


def nearest_multiple(size: float, unit: int) -> int:
    """The multiple of `unit` that is nearest to `size`, at least `unit`."""
    return max(1, round(size / unit)) * unit
