"""Driver and workers: a decoder or scorer on several tensor ranks that is controlled by the first of them.

What is called on the driver (tensor rank 0) is broadcast to the workers (tensor ranks > 0), which call the same method with the
same arguments. So whatever takes decisions (sampling, batching, a server) runs on one rank and does not depend on the others.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from models.inference.decoder import Decoder
from models.inference.scoring import TokenScorer
from parallel.grid import Grid
from parallel.object_collectives import broadcast_ints, receive_ints

CALLS: dict[str, Callable[[Any, list[list[int]]], object]] = {
    "admit": lambda decoder, prompts: decoder.admit(prompts),
    "step": lambda decoder, lists: decoder.step(lists[0]),
    "drop": lambda decoder, lists: decoder.drop(lists[0][0]),
    "reorder": lambda decoder, lists: decoder.reorder(lists[0]),
    "clear": lambda decoder, lists: decoder.clear(),
    "score": lambda scorer, lists: scorer.score(lists[1:], lists[0]),
}
"""Method of the driver -> the same call on a worker's decoder or scorer, with the lists of integers that the driver broadcast."""
NUMBERS = {name: number for number, name in enumerate([*CALLS, "release"])}
"""How a message names the call: its first list holds this number."""


class Driver:
    """Mixin of what runs on tensor rank 0. The other tensor ranks are in `run_worker` until `release`."""

    grid: Grid

    def release(self) -> None:
        """Lets the workers return from `run_worker`. Must be the last call."""
        self._broadcast("release")

    def _broadcast(self, call: str, *lists: Sequence[int]) -> None:
        assert self.grid.tensor_group is not None
        broadcast_ints([[NUMBERS[call]], *lists], self.grid.tensor_group)


class DriverDecoder(Driver, Decoder):
    """A Decoder whose methods run on all tensor ranks when they are called on tensor rank 0."""

    def admit(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self._broadcast("admit", *prompts)
        return super().admit(prompts)

    def step(self, ids: Sequence[int]) -> Tensor:
        self._broadcast("step", ids)
        return super().step(ids)

    def drop(self, row: int) -> None:
        self._broadcast("drop", [row])
        super().drop(row)

    def reorder(self, parents: Sequence[int]) -> None:
        self._broadcast("reorder", parents)
        super().reorder(parents)

    def clear(self) -> None:
        self._broadcast("clear")
        super().clear()


class DriverScorer(Driver, TokenScorer):
    """A TokenScorer whose `score` runs on all tensor ranks when it is called on tensor rank 0."""

    def score(self, rows: Sequence[Sequence[int]], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        self._broadcast("score", counts, *rows)
        return super().score(rows, counts)


def run_worker(worker: Decoder | TokenScorer) -> None:
    """Repeats on a tensor rank > 0 the calls of the driver on tensor rank 0, until the driver's `release`."""
    assert worker.grid.tensor_group is not None
    calls = list(CALLS.values())
    while True:
        (number, *_), *lists = receive_ints(worker.grid.tensor_group)
        if number == NUMBERS["release"]:
            return
        calls[number](worker, lists)
