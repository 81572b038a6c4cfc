"""Which rank writes which part of an engine's state, and how that part comes to it: every slice from the rank that holds most of it.

Stages 1 and 2 keep most parameters whole on one data rank, and nothing travels; the few that lie across a border, and all of stage
3, are put together on one data rank. Slices of different tensor ranks are never joined: they are pieces of a logical tensor, each
written by its own rank. What tensor ranks hold alike is dealt out among them. A tied table is written by the stage that owns it.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.checkpoint.manifest import KINDS
from parallel.checkpoint.writer import Part
from parallel.engines.engine import Engine
from parallel.engines.optimizer_state import fragment
from parallel.slices import Region, slice_of

AHEAD = 128 * 2**20
"""Bytes of slices that a rank receives before it comes to write them."""


@dataclass(frozen=True)
class Shard:
    """A parameter whose slice one rank of a data group writes; the same on all ranks of the group, but for the parameter itself."""

    name: str
    parameter: nn.Parameter
    held: tuple[tuple[int, int], ...]
    """(first, count) of the slice's elements that each data rank holds."""
    writer: int
    """Its data rank. It holds at least as many as any other."""

    @property
    def alone(self) -> bool:
        """Whether the writer holds the whole slice."""
        return all(count == 0 for rank, (_, count) in enumerate(self.held) if rank != self.writer)


def assign_writers(engine: Engine) -> list[Shard]:
    """What this rank's data group writes. Collective over the data group.

    Of the ranks that hold most of a slice the one with the fewest elements so far writes it.
    """
    grid = engine.grid
    owned = [(name, parameter) for name, parameter in engine.parameters.items() if engine.owns(name)]
    ours = [(name, p) for i, (name, p) in enumerate(owned) if slice_of(p).dim is not None or i % grid.tensor == grid.tensor_rank]
    table = _over_data([_span(parameter) for _, parameter in ours], engine)
    shares, written = [], [0] * grid.data
    for (name, parameter), held in zip(ours, zip(*table, strict=True), strict=True):
        most = max(count for _, count in held)
        writer = min((rank for rank in range(grid.data) if held[rank][1] == most), key=written.__getitem__)
        written[writer] += sum(count for _, count in held)
        shares.append(Shard(name, parameter, held, writer))
    return shares


def _span(parameter: nn.Parameter) -> tuple[int, int]:
    own = fragment(parameter, "weights")
    return own.start, own.values.numel()


def _over_data(spans: list[tuple[int, int]], engine: Engine) -> list[list[tuple[int, int]]]:
    told = [spans] * engine.grid.data
    if engine.grid.data_group is not None:
        dist.all_gather_object(told, spans, group=engine.grid.data_group)
    return told


def parts_of(engine: Engine, shares: Sequence[Shard]) -> list[Part]:
    """What this rank writes, in the order in which `collected` yields it."""
    return [
        Part(kind, share.name, slice_of(share.parameter).shape, *_place(share, region))
        for kind in KINDS
        for share in shares
        if share.writer == engine.grid.data_rank
        for region in _regions(share, engine)
    ]


def gather_shards(engine: Engine, shares: Sequence[Shard]) -> Iterator[Tensor]:
    """The tensors of `parts_of`, fp32, on the CPU; each may be the optimizer's own memory.

    Collective over the data group: all of its ranks walk to the end. Holds one parameter's slice and at most AHEAD bytes more:
    ranks send without waiting and receive ahead, so that none is held up while another writes. All meet in the same order.
    """
    walk = iter([(kind, share) for kind in KINDS for share in shares])
    under_way: deque[_Transfer] = deque()
    sent: list[_Transfer] = []
    following = next(walk, None)
    while following or under_way:
        while following and _has_room(under_way, *following, engine):
            under_way.append(_start_exchange(*following, engine))
            following = next(walk, None)
        transfer = under_way.popleft()
        if transfer.flat is None and not transfer.held:
            sent.append(transfer)
            continue
        transfer.wait()
        if transfer.flat is not None:
            yield from _regions_of(transfer, engine)
    for transfer in sent:
        transfer.wait()


@dataclass
class _Transfer:
    """A share on its way to its writer, as one rank sees it."""

    share: Shard
    flat: Tensor | None
    """The whole flat slice, once `wait` is through; None where another rank writes it."""
    tensors: list[Tensor]
    """What is sent or received; alive until it is through."""
    works: list[dist.Work]
    held: int
    """Bytes that it takes meanwhile."""

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def _has_room(under_way: deque[_Transfer], kind: str, share: Shard, engine: Engine) -> bool:
    more = _cost(kind, share, engine)
    return not under_way or more == 0 or more + sum(transfer.held for transfer in under_way) <= AHEAD


def _cost(kind: str, share: Shard, engine: Engine) -> int:
    """Bytes that this rank must find for the transfer: of a slice to receive, or of a copy on the device that sends."""
    own = fragment(share.parameter, kind).values
    if share.alone:
        return 0
    if share.writer == engine.grid.data_rank:
        return own.element_size() * sum(count for _, count in share.held)
    return 0 if own.device == engine.device else own.nbytes


def _start_exchange(kind: str, share: Shard, engine: Engine) -> _Transfer:
    """Starts to send or to receive. One batch: NCCL then uses the group's own communicator, not one for every pair (not run)."""
    own, rank = fragment(share.parameter, kind).values, engine.grid.data_rank
    held = _cost(kind, share, engine)
    if share.alone:
        return _Transfer(share, own if share.writer == rank else None, [], [], held)
    if share.writer != rank:
        tensors = [own.to(engine.device)] if own.numel() else []
        return _Transfer(share, None, tensors, _exchange([(dist.isend, tensor, share.writer) for tensor in tensors], engine), held)
    flat = torch.empty(sum(count for _, count in share.held), device=engine.device)
    parts = [flat[first : first + count] for first, count in share.held]
    parts[rank].copy_(own)
    wanted = [(dist.irecv, part, other) for other, part in enumerate(parts) if other != rank and part.numel()]
    return _Transfer(share, flat, parts, _exchange(wanted, engine), held)


def _exchange(operations: list, engine: Engine) -> list[dist.Work]:
    if not operations:
        return []
    group = engine.grid.data_group
    return dist.batch_isend_irecv([dist.P2POp(do, tensor, group=group, group_peer=peer) for do, tensor, peer in operations])


def _regions_of(transfer: _Transfer, engine: Engine) -> Iterator[Tensor]:
    assert transfer.flat is not None
    piece = transfer.flat.view(slice_of(transfer.share.parameter).local_shape(engine.grid.tensor)).cpu()
    for region in _regions(transfer.share, engine):
        dim, _, length = _place(transfer.share, region)
        yield piece.narrow(dim, region.local, length)


def _regions(share: Shard, engine: Engine) -> list[Region]:
    """The intervals of the slice that this tensor rank holds; of one that is not cut, all rows."""
    cut, grid = slice_of(share.parameter), engine.grid
    return [Region(0, 0, cut.shape[0])] if cut.dim is None else cut.regions(grid.tensor_rank, grid.tensor)


def _place(share: Shard, region: Region) -> tuple[int, int, int]:
    """(dim, start, length) of a region in the whole tensor."""
    return slice_of(share.parameter).dim or 0, region.whole, region.length
