"""The communication volume of DeepSpeed's engines along the data and pipe axes in one step, in closed form. No torch.

Measured with DeepSpeed 0.19.8 in fp32 at our configuration. It differs from the ideal 2(d−1)/d·P of arXiv:1910.02054 (§7): stages 1
and 2 all-reduce gradients instead of reduce-scattering them, stage 2 in every micro-batch; and flat groups are padded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

ALIGNMENT = 2
"""DeepSpeed pads each flat group of parameters to a multiple of this many elements per data rank."""
PERSISTENT = 100_000
"""ZeRO-3 keeps parameters of at most this many elements gathered between steps (`param_persistence_threshold`)."""


@dataclass(frozen=True)
class Call:
    """One kind of collective that a rank issues: its axis and layer, the operation, the size of the whole tensor, how often."""

    axis: str
    layer: str
    """embedding, blocks.0, …, loss; empty if it belongs to no layer."""
    direction: str
    """forward, backward, or empty."""
    operation: str
    formula: str
    """The size in the paper's letters: b micro-batch, s sequence, h hidden, e head size, V vocabulary, P this rank's parameters."""
    elements: int
    """The same in numbers."""
    times: int
    ranks: int
    """Size of the group; 2 for a send."""


def data_calls(zero_stage: int, shapes: Sequence[tuple[int, ...]], data: int, micro_batches: int) -> Iterator[Call]:
    """The collectives of one step along the data axis. `shapes` are those of this rank's slices. Elements are totals over all buckets."""
    if data == 1:
        return
    sizes = [prod(shape) for shape in shapes]
    if zero_stage == 3:
        # Gradients are reduce-scattered in every micro-batch; parameters are gathered once per step if all of them are persistent.
        if max(sizes) > PERSISTENT:
            raise ValueError(f"a parameter of {max(sizes)} > {PERSISTENT} elements is gathered at each use: that has no closed form here")
        padded = sum(_padded(size, data) for size in sizes)
        yield Call("data", "", "", "reduce_scatter", "P, padded, each micro-batch", micro_batches * padded, 1, data)
        yield Call("data", "", "", "all_gather", "P, padded", padded, 1, data)
        return
    reduced = micro_batches if zero_stage == 2 else 1
    formula = "P" if zero_stage == 1 else "P each micro-batch"
    yield Call("data", "", "", "all_reduce", formula, reduced * sum(sizes), 1, data)
    groups = [sum(size for size, shape in zip(sizes, shapes, strict=True) if (len(shape) >= 2) is matrix) for matrix in (True, False)]
    yield Call("data", "", "", "all_gather", "P, padded", sum(_padded(size, ALIGNMENT * data) for size in groups), 1, data)


def pipe_calls(stage: int, stages: int, activation: int, formula: str, micro_batches: int, tied: int) -> Iterator[Call]:
    """The sends, receives and all-reduces of one step on a rank of `stage`.

    `activation`: elements passed between stages, b·s·h, or b·s·h/t; `tied`: elements of this rank's tied table, 0 if there is none.
    """
    inner = (stage > 0) + (stage < stages - 1)
    if inner:
        for operation in ("send", "recv"):  # activations to the next stage and gradients to the previous one, and the reverse
            yield Call("pipe", "", "", operation, formula, activation, inner * micro_batches, 2)
    if tied and inner and stage in (0, stages - 1):
        yield Call("pipe", "", "", "all_reduce", "V·h/t", tied, 1, 2)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
