"""Which rank writes which part of an engine's state, and how that part comes to it: every slice from the rank that holds most of it.

Stages 1 and 2 keep most parameters whole on one data rank, and nothing travels; the few that lie across a border, and all of stage
3, are put together on one data rank. Slices of different tensor ranks are never joined: they are pieces of a logical tensor, each
written by its own rank. What tensor ranks hold alike is dealt out among them. A tied table is written by the stage that owns it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.checkpoint_manifest import KINDS
from parallel.checkpoint_writer import Part
from parallel.engine import Engine
from parallel.engine_state import fragment
from parallel.slices import Region, slice_of


@dataclass(frozen=True)
class Share:
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


def deal(engine: Engine) -> list[Share]:
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
        shares.append(Share(name, parameter, held, writer))
    return shares


def _span(parameter: nn.Parameter) -> tuple[int, int]:
    own = fragment(parameter, "weights")
    return own.start, own.values.numel()


def _over_data(spans: list[tuple[int, int]], engine: Engine) -> list[list[tuple[int, int]]]:
    told = [spans] * engine.grid.data
    if engine.grid.data_group is not None:
        dist.all_gather_object(told, spans, group=engine.grid.data_group)
    return told


def parts_of(engine: Engine, shares: Sequence[Share]) -> list[Part]:
    """What this rank writes, in the order in which `collected` yields it."""
    return [
        Part(kind, share.name, slice_of(share.parameter).shape, *_place(share, region))
        for kind, share in _walk(shares)
        if share.writer == engine.grid.data_rank
        for region in _regions(share, engine)
    ]


def collected(engine: Engine, shares: Sequence[Share]) -> Iterator[Tensor]:
    """The tensors of `parts_of`, fp32, on the CPU: views of the optimizer's own memory, or of a buffer that the next one overwrites.

    Collective over the data group: all of its ranks walk to the end. Holds at most one slice of one parameter.
    """
    buffer = _buffer(engine, shares)
    for kind, share in _walk(shares):
        flat = _whole(kind, share, engine, buffer)
        if flat is not None:
            slice_ = flat.view(slice_of(share.parameter).local_shape(engine.grid.tensor)).cpu()
            for region in _regions(share, engine):
                dim, _, length = _place(share, region)
                yield slice_.narrow(dim, region.local, length)


def _buffer(engine: Engine, shares: Sequence[Share]) -> Tensor:
    """Room for the largest slice that this rank puts together."""
    sizes = [sum(count for _, count in share.held) for share in shares if share.writer == engine.grid.data_rank and not share.alone]
    return torch.empty(max(sizes, default=0), device=engine.device)


def _whole(kind: str, share: Share, engine: Engine, buffer: Tensor) -> Tensor | None:
    """The whole flat slice on its writer, None elsewhere.

    Sends and receives are given in one batch: NCCL then uses the group's own communicator instead of one for every pair (not run).
    """
    own, rank = fragment(share.parameter, kind).values, engine.grid.data_rank
    if share.alone:
        return own if share.writer == rank else None
    if share.writer != rank:
        if own.numel():
            _exchange([(dist.isend, own.to(engine.device), share.writer)], engine)
        return None
    parts = [buffer[first : first + count] for first, count in share.held]
    parts[rank].copy_(own)
    _exchange([(dist.irecv, part, other) for other, part in enumerate(parts) if other != rank and part.numel()], engine)
    return buffer[: sum(map(len, parts))]


def _exchange(operations: list, engine: Engine) -> None:
    group = engine.grid.data_group
    for work in dist.batch_isend_irecv([dist.P2POp(do, tensor, group=group, group_peer=peer) for do, tensor, peer in operations]):
        work.wait()


def _regions(share: Share, engine: Engine) -> list[Region]:
    """The intervals of the slice that this tensor rank holds; of one that is not cut, all rows."""
    cut, grid = slice_of(share.parameter), engine.grid
    return [Region(0, 0, cut.shape[0])] if cut.dim is None else cut.regions(grid.tensor_rank, grid.tensor)


def _place(share: Share, region: Region) -> tuple[int, int, int]:
    """(dim, start, length) of a region in the whole tensor."""
    return slice_of(share.parameter).dim or 0, region.whole, region.length


def _walk(shares: Sequence[Share]) -> Iterator[tuple[str, Share]]:
    return ((kind, share) for kind in KINDS for share in shares)
