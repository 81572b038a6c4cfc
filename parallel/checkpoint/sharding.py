"""Which rank writes which part of an engine's state, and how the part gets there: the rank that holds most of a slice writes it.

Under ZeRO-1 and 2 most parameters lie whole on one data rank, and nothing is sent. The few that cross a border between data ranks,
and all parameters under ZeRO-3, are gathered on one data rank. Slices of different tensor ranks are never joined: they are pieces
of a logical tensor, each written by its own rank. Parameters that tensor ranks hold alike are distributed among them. A tied table
is written by the stage that owns it.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.checkpoint.writer import Part
from parallel.engines.engine import Engine
from parallel.engines.optimizer_state import fragment, kinds_of
from parallel.slices import Region, slice_of

AHEAD = 128 * 2**20
"""Bytes of slices that a rank may by default receive before it writes them."""


@dataclass(frozen=True)
class Shard:
    """A parameter whose slice one rank of a data group writes. Equal on all ranks of the group, except for the parameter itself."""

    name: str
    parameter: nn.Parameter
    held: tuple[tuple[int, int], ...]
    """(first, count) of the slice's elements that each data rank holds."""
    writer: int
    """The data rank that writes the slice. It holds at least as many elements as any other."""

    @property
    def alone(self) -> bool:
        """Whether the writer holds the whole slice."""
        return all(count == 0 for rank, (_, count) in enumerate(self.held) if rank != self.writer)


def assign_writers(engine: Engine) -> list[Shard]:
    """The slices that this rank's data group writes. Collective over the data group.

    Among the ranks that hold most of a slice, the one with the fewest elements so far writes it.
    """
    grid = engine.grid
    owned = [(name, parameter) for name, parameter in engine.parameters.items() if engine.owns(name)]
    ours = [(name, p) for i, (name, p) in enumerate(owned) if slice_of(p).dim is not None or i % grid.tensor == grid.tensor_rank]
    fragments = [fragment(parameter, "weights") for _, parameter in ours]
    spans = [(part.start, part.values.numel()) for part in fragments]
    table = [spans] * grid.data
    if grid.data_group is not None:
        dist.all_gather_object(table, spans, group=grid.data_group)

    shards, written = [], [0] * grid.data
    for (name, parameter), held in zip(ours, zip(*table, strict=True), strict=True):
        most = max(count for _, count in held)
        writer = min((rank for rank in range(grid.data) if held[rank][1] == most), key=written.__getitem__)
        written[writer] += sum(count for _, count in held)
        shards.append(Shard(name, parameter, held, writer))
    return shards


def parts_of(engine: Engine, shards: Sequence[Shard]) -> list[Part]:
    """The parts that this rank writes, in the order in which `gather_shards` yields their tensors."""
    parts = []
    for kind, shard in itertools.product(kinds_of(engine), shards):
        if shard.writer == engine.grid.data_rank:
            cut = slice_of(shard.parameter)
            parts += [Part(kind, shard.name, cut.shape, cut.dim or 0, r.whole, r.length) for r in _regions(shard, engine)]
    return parts


def gather_shards(engine: Engine, shards: Sequence[Shard], ahead: int = AHEAD) -> Iterator[Tensor]:
    """The tensors of `parts_of`, fp32, on the CPU; each may be the optimizer's own memory.

    Collective over the data group: all of its ranks iterate to the end, in the same order. Holds one parameter's slice and at most
    `ahead` bytes more: ranks send without waiting and receive ahead, so that no rank waits while another one writes.
    """
    waiting = deque(itertools.product(kinds_of(engine), shards))
    in_flight: deque[_Transfer] = deque()
    sent: list[_Transfer] = []
    while waiting or in_flight:
        # Start as many transfers as there is room for, at least one.
        while waiting:
            cost = _cost(*waiting[0], engine)
            if in_flight and cost and cost + sum(transfer.held for transfer in in_flight) > ahead:
                break
            in_flight.append(_start_exchange(*waiting.popleft(), engine))

        # Finish the oldest one; a send that holds no memory of its own is waited for at the end.
        transfer = in_flight.popleft()
        if transfer.flat is None and not transfer.held:
            sent.append(transfer)
            continue
        transfer.wait()
        if transfer.flat is not None:
            cut = slice_of(transfer.shard.parameter)
            piece = transfer.flat.view(cut.local_shape(engine.grid.tensor)).cpu()
            for region in _regions(transfer.shard, engine):
                yield piece.narrow(cut.dim or 0, region.local, region.length)
    for transfer in sent:
        transfer.wait()


@dataclass
class _Transfer:
    """One rank's part in sending a shard to its writer."""

    shard: Shard
    flat: Tensor | None
    """The whole flat slice, complete after `wait`; None if another rank writes it."""
    tensors: list[Tensor]
    """The tensors that are sent or received; kept alive until the transfer is complete."""
    works: list[dist.Work]
    held: int
    """Bytes that the transfer takes on this rank."""

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def _cost(kind: str, shard: Shard, engine: Engine) -> int:
    """Bytes that this rank must allocate for the transfer: for a slice to receive, or for a copy on the device that sends."""
    own = fragment(shard.parameter, kind).values
    if shard.alone:
        return 0
    if shard.writer == engine.grid.data_rank:
        return own.element_size() * sum(count for _, count in shard.held)
    return 0 if own.device == engine.device else own.nbytes


def _start_exchange(kind: str, shard: Shard, engine: Engine) -> _Transfer:
    """Starts to send or to receive, in one batch, so that NCCL uses the group's own communicator and not one per pair (not run)."""
    own, rank = fragment(shard.parameter, kind).values, engine.grid.data_rank
    held = _cost(kind, shard, engine)
    if shard.alone:
        return _Transfer(shard, own if shard.writer == rank else None, [], [], held)
    if shard.writer != rank:
        tensors = [own.to(engine.device)] if own.numel() else []
        return _Transfer(shard, None, tensors, _exchange([(dist.isend, tensor, shard.writer) for tensor in tensors], engine), held)
    flat = torch.empty(sum(count for _, count in shard.held), device=engine.device)
    parts = [flat[first : first + count] for first, count in shard.held]
    parts[rank].copy_(own)
    wanted = [(dist.irecv, part, other) for other, part in enumerate(parts) if other != rank and part.numel()]
    return _Transfer(shard, flat, parts, _exchange(wanted, engine), held)


def _exchange(operations: list, engine: Engine) -> list[dist.Work]:
    if not operations:
        return []
    group = engine.grid.data_group
    return dist.batch_isend_irecv([dist.P2POp(do, tensor, group=group, group_peer=peer) for do, tensor, peer in operations])


def _regions(shard: Shard, engine: Engine) -> list[Region]:
    """The intervals of the slice that this tensor rank holds; all rows if it is not cut."""
    cut, grid = slice_of(shard.parameter), engine.grid
    return [Region(0, 0, cut.shape[0])] if cut.dim is None else cut.regions(grid.tensor_rank, grid.tensor)
