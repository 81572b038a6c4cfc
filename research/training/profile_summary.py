"""The summary of recorded steps as tables: time by layer and module, collectives by axis, allocations."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from parallel.layer_timer import DIRECTIONS, NOT_LAYERS

AXES = ("pipe", "data", "tensor")
BLOCK = re.compile(r"blocks\.\d+")
BOOKKEEPING = "bookkeeping"
MOST_SHOWN = 12
"""How many operations that allocate the table shows."""

Rank = Mapping[str, Any]
"""What one rank has recorded (research/training/profiler.py)."""


@dataclass(frozen=True)
class Summary:
    """What all ranks recorded in `steps`. Times and counts of the tables are those of one step."""

    steps: Sequence[int]
    ranks: Sequence[Rank]
    before_ms: float = 0.0
    """Milliseconds of a step of this launch before recording began; 0: there was none."""

    def to_json(self) -> dict[str, Any]:
        """The content of summary.json: sums over the recorded steps."""
        return {"steps": list(self.steps), "step_ms": self.step_ms, "step_ms_before": self.before_ms or None, "ranks": list(self.ranks)}

    @property
    def step_ms(self) -> float:
        """Milliseconds of a recorded step, the mean over ranks."""
        return 1e3 * fmean(rank["seconds"] for rank in self.ranks) / len(self.steps)

    def lines(self, every_block: bool = False) -> list[str]:
        """The tables, line by line. `every_block` False: the blocks are one."""
        first, last = self.steps[0], self.steps[-1]
        steps = f"step {first}" if first == last else f"steps {first}–{last}"
        before = f" ({self.before_ms:,.1f} before recording)" if self.before_ms else ""
        found = ["", f"profile of {steps} · {self.step_ms:,.1f} ms a step while recorded{before}", "", *self._layers(every_block)]
        if any(rank["collectives"] for rank in self.ranks):
            found += ["", *self._collectives()]
        if any(rank.get("memory") for rank in self.ranks):
            found += ["", *self._memory()]
        return [*found, ""]

    def _layers(self, every_block: bool) -> Iterator[str]:
        """Milliseconds of each layer per step on a rank that has it, and their share of that rank's step; under it, its modules."""
        times = self.layer_ms(every_block)
        shown = [direction for direction in DIRECTIONS if any(direction in columns for columns, _ in times.values())]
        yield f"{'ms a step':<28}" + "".join(f"{direction:>12}" for direction in shown) + f"{'share':>9}"
        for (layer, part), (columns, share) in times.items():
            name = f"  {part}" if part else layer
            cells = "".join(f"{columns[direction]:12,.2f}" if direction in columns else f"{'':12}" for direction in shown)
            if layer in NOT_LAYERS:
                cells = f"{columns['']:12,.2f}" + " " * 12 * (len(shown) - 1)
            yield f"{name:<28}{cells}{100 * share:8.1f} %"

    def layer_ms(self, every_block: bool = False) -> dict[tuple[str, str], tuple[dict[str, float], float]]:
        """(layer, part) -> (milliseconds per step by direction, share of the step), in the order of the layers.

        A layer's row holds its parts, too. The blocks of a rank are one row, "blocks × 4", unless `every_block`.
        """
        sums: dict[tuple[str, str], dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(float)))
        blocks = {one["layer"] for rank in self.ranks for one in rank["layers"] if BLOCK.fullmatch(one["layer"])}
        for number, rank in enumerate(self.ranks):
            for one in rank["layers"]:
                block = BLOCK.fullmatch(one["layer"]) and not every_block
                layer = f"blocks × {len(blocks)}" if block else one["layer"]
                for part in dict.fromkeys(["", one["part"]]):
                    sums[layer, part][number][one["direction"]] += one["seconds"]
        # a stage holds a part of the blocks: those of all stages add up, those of tensor and data ranks are one
        replicas = len(self.ranks) / len({rank["pipe"] for rank in self.ranks})
        found = {}
        for key, by_rank in sums.items():
            divisor = replicas if key[0].startswith("blocks × ") else len(by_rank)
            columns: dict[str, float] = defaultdict(float)
            for directions in by_rank.values():
                for direction, seconds in directions.items():
                    columns[direction] += 1e3 * seconds / divisor / len(self.steps)
            share = sum(sum(directions.values()) / self.ranks[number]["seconds"] for number, directions in by_rank.items()) / len(by_rank)
            found[key] = (dict(columns), share)
        return dict(sorted(found.items(), key=lambda item: _place(*item[0])))

    def _collectives(self) -> Iterator[str]:
        """Calls, megabytes of whole tensors and milliseconds per step; least–most of the ranks where they differ."""
        kinds: dict[tuple[str, str], list[list[float]]] = defaultdict(lambda: [[0.0] * 3 for _ in self.ranks])
        for number, rank in enumerate(self.ranks):
            for one in rank["collectives"]:
                row = kinds[one["axis"], BOOKKEEPING if one["bookkeeping"] else one["operation"]][number]
                for column, amount in enumerate((one["calls"], one["bytes"] / 1e6, 1e3 * one["seconds"])):
                    row[column] += amount / len(self.steps)
        yield f"{'collectives of a rank, a step':<30}{'calls':>12}{'MB':>16}{'ms':>18}"
        for (axis, operation), rows in sorted(kinds.items(), key=lambda item: (item[0][1] == BOOKKEEPING, item[0])):
            calls, megabytes, milliseconds = (
                _range(column, digits) for column, digits in zip(zip(*rows, strict=True), (1, 3, 2), strict=True)
            )
            yield f"{axis:<16}{operation:<14}{calls:>12}{megabytes:>16}{milliseconds:>18}"

    def _memory(self) -> Iterator[str]:
        """What one rank, the first, has allocated and not freed within the operation or layer, per step."""
        found = self.ranks[0]["memory"]
        for title, is_layer in (("layers", True), ("operations", False)):
            rows = [one for one in found if one["is_layer"] is is_layer][:MOST_SHOWN]
            yield f"{title + ' that allocate, a step (rank 0)':<40}{'calls':>10}{'MB':>12}"
            for one in rows:
                megabytes = max(one["bytes"], one["device_bytes"]) / 1e6 / len(self.steps)
                yield f"{one['name']:<40}{one['calls'] / len(self.steps):10,.1f}{megabytes:12,.2f}"


def _place(layer: str, part: str) -> tuple:
    """Where a row stands: embedding, blocks, other layers, the loss, then what is no layer. A layer stands before its parts."""
    order = ["embedding", "position", "blocks", "final_norm", "head", "loss", *NOT_LAYERS]
    name = "blocks" if layer.startswith("blocks") else layer
    number = int(layer.rpartition(".")[2]) if BLOCK.fullmatch(layer) else 0
    return order.index(name) if name in order else order.index("final_norm"), number, part


def _range(values: Sequence[float], digits: int) -> str:
    """'24' if all are equal, else '12–24', rounded."""
    least, most = (
        f"{bound:,.{digits}f}".rstrip("0").rstrip(".") if digits == 1 else f"{bound:,.{digits}f}" for bound in (min(values), max(values))
    )
    return least if least == most else f"{least}–{most}"
