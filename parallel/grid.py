"""The rank grid: a rank's pipe × data × tensor coordinates, and the process group of each axis."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from parallel.errors import Mistake

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Grid:
    """A rank's coordinates among pipe × data × tensor ranks. It is an argument everywhere, never a global.

    The tensor axis is the innermost one, because neighbouring ranks share a node's fast links; pipe is the outermost:
    rank = (pipe_rank · data + data_rank) · tensor + tensor_rank, the order of DeepSpeed's PipeModelDataParallelTopology.

    A group is None on an axis of one rank, so that a single process needs no process groups, and on every axis of a grid that
    only describes a layout. A collective over None is the identity.
    """

    pipe: int = 1
    data: int = 1
    tensor: int = 1
    rank: int = 0
    pipe_group: "ProcessGroup | None" = None
    data_group: "ProcessGroup | None" = None
    tensor_group: "ProcessGroup | None" = None
    model_group: "ProcessGroup | None" = None
    """The pipe × tensor ranks that together hold one replica of the model."""
    sequence: bool = False
    """Whether activations between sliced regions are cut along the sequence (parallel/region.py)."""

    @property
    def world(self) -> int:
        """Number of ranks: pipe · data · tensor."""
        return self.pipe * self.data * self.tensor

    @property
    def tensor_rank(self) -> int:
        """Which slice of every sliced tensor this rank holds, 0 … tensor − 1."""
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        """Which share of the batch this rank processes, 0 … data − 1."""
        return self.rank // self.tensor % self.data

    @property
    def pipe_rank(self) -> int:
        """Which stage of the pipeline this rank runs, 0 … pipe − 1."""
        return self.rank // (self.tensor * self.data)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank reads token ids."""
        return self.pipe_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pipe_rank == self.pipe - 1

    def ranks_along(self, *axes: str) -> list[list[int]]:
        """All groups of global ranks that differ in the named axes only: `ranks_along("tensor")` → [[0, 1], [2, 3]]."""
        sizes = {"pipe": self.pipe, "data": self.data, "tensor": self.tensor}
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            place = Grid(self.pipe, self.data, self.tensor, rank)
            key = tuple(getattr(place, f"{axis}_rank") for axis in sizes if axis not in axes)
            groups.setdefault(key, []).append(rank)
        return list(groups.values())


def make_grid(pipe: int, tensor: int, sequence: bool = False) -> Grid:
    """The grid of this process in the initialised world; data = world / (pipe · tensor).

    Collective: every rank creates every group in the same order. Under NCCL a group's communicator is made at its first use.
    """
    import torch.distributed as dist

    from parallel.distributed import TIMEOUT

    world, rank = dist.get_world_size(), dist.get_rank()
    if world % (pipe * tensor):
        enough, works = world + -world % (pipe * tensor), ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise Mistake(
            f"parallel.pipe = {pipe} × parallel.tensor = {tensor} does not divide the world of {world} ranks → "
            f"launch {enough} ranks, or set pipe and tensor so that their product is one of {works}"
        )

    grid = Grid(pipe, world // (pipe * tensor), tensor, rank, sequence=sequence)
    axes = {"pipe": ("pipe",), "data": ("data",), "tensor": ("tensor",), "model": ("pipe", "tensor")}
    own_groups: dict[str, Any] = {}
    for name, along in axes.items():
        for ranks in grid.ranks_along(*along):
            if len(ranks) > 1:
                group = dist.new_group(ranks, timeout=TIMEOUT)
                if rank in ranks:
                    own_groups[f"{name}_group"] = group
    return replace(grid, **own_groups)


def neighbours_group(grid: Grid, size: int) -> "ProcessGroup | None":
    """The group of this rank among `size` neighbouring tensor ranks, where `size` divides grid.tensor; None if `size` is 1.

    Collective over all ranks of the world, also over those that are in no such group: every rank creates every group in the same order.
    Its members alone could create it too, but not once a device is bound to the world's group: NCCL then splits the communicator of all
    ranks, and waits for them. None on a grid that only describes a layout.
    """
    import torch.distributed as dist

    from parallel.distributed import TIMEOUT

    if size == 1 or grid.tensor_group is None:
        return None
    own: Any = None
    for ranks in grid.ranks_along("tensor"):
        for first in range(0, grid.tensor, size):
            members = ranks[first : first + size]
            group = dist.new_group(members, timeout=TIMEOUT)
            own = group if grid.rank in members else own
    return own
