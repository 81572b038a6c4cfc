"""The grid's coordinates against DeepSpeed's own topology, and its process groups on real ranks."""

import itertools

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from parallel.errors import Mistake
from parallel.grid import Grid, make_grid, neighbours_group
from tests.harness import run_ranks

SHAPES = list(itertools.product([1, 2, 3, 4], [1, 2, 3], [1, 2, 4]))
AXES = {"pipe": "pipe", "data": "data", "tensor": "model"}


@pytest.mark.parametrize(("pipe", "data", "tensor"), SHAPES)
def test_coordinates_are_those_of_deepspeeds_topology(pipe: int, data: int, tensor: int) -> None:
    topology = PipeModelDataParallelTopology(num_pp=pipe, num_mp=tensor, num_dp=data)
    assert Grid(pipe, data, tensor).world == topology.world_size()
    for rank in range(pipe * data * tensor):
        grid, theirs = Grid(pipe, data, tensor, rank), topology.get_coord(rank)
        assert (grid.pipe_rank, grid.data_rank, grid.tensor_rank) == (theirs.pipe, theirs.data, theirs.model)
        assert grid.is_first_stage == (theirs.pipe == 0) and grid.is_last_stage == (theirs.pipe == pipe - 1)


@pytest.mark.parametrize(("pipe", "data", "tensor"), SHAPES)
def test_groups_are_those_of_deepspeeds_topology(pipe: int, data: int, tensor: int) -> None:
    topology = PipeModelDataParallelTopology(num_pp=pipe, num_mp=tensor, num_dp=data)
    grid = Grid(pipe, data, tensor)
    for ours, theirs in AXES.items():
        expected = topology.get_axis_comm_lists(theirs) or [[rank] for rank in range(grid.world)]
        assert sorted(grid.ranks_along(ours)) == sorted(expected)
    replicas = [sorted(topology.filter_match(data=i)) for i in range(data)]
    assert sorted(grid.ranks_along("pipe", "tensor")) == sorted(replicas)


def sums_along_groups(pipe: int, tensor: int) -> dict[str, int]:
    """The sum of 2^rank over each group: which ranks are in it, as bits."""
    grid = make_grid(pipe, tensor)
    found = {"rank": grid.rank, "world": grid.world}
    for axis in ("pipe", "data", "tensor", "model"):
        members = torch.tensor(2**grid.rank)
        group = getattr(grid, f"{axis}_group")
        if group is not None:
            dist.all_reduce(members, group=group)
        found[axis] = int(members)
    return found


@pytest.mark.parametrize(
    ("pipe", "tensor"), [(2, 2), (1, 4), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, 1), (1, 2), (2, 1), (4, 1)))]
)
def test_each_rank_holds_the_groups_it_stands_in(pipe: int, tensor: int) -> None:
    for rank, found in enumerate(run_ranks(sums_along_groups, 4, pipe, tensor)):
        assert found["rank"] == rank and found["world"] == 4
        grid = Grid(pipe, 4 // pipe // tensor, tensor)
        for name, axes in {"pipe": ("pipe",), "data": ("data",), "tensor": ("tensor",), "model": ("pipe", "tensor")}.items():
            (members,) = (ranks for ranks in grid.ranks_along(*axes) if rank in ranks)
            assert found[name] == sum(2**member for member in members), name


def refused_world(pipe: int, tensor: int) -> str:
    with pytest.raises(Mistake) as refused:
        make_grid(pipe, tensor)
    return str(refused.value)


def test_a_world_that_the_model_does_not_divide_is_refused() -> None:
    for told in run_ranks(refused_world, 3, 2, 1):
        assert "parallel.pipe = 2" in told and "parallel.tensor = 1" in told and "3 ranks → launch 4 ranks" in told
        assert told.endswith("one of 1, 3")


def test_a_grid_without_groups_is_alone() -> None:
    grid = Grid()
    assert grid.world == 1 and grid.is_first_stage and grid.is_last_stage
    assert grid.pipe_group is grid.data_group is grid.tensor_group is grid.model_group is None


def neighbours(tensor: int, size: int) -> tuple[list[int], int]:
    """The ranks of this rank's group of neighbours, and how many groups this rank has taken part in creating."""
    grid = make_grid(1, tensor)
    before = dist.distributed_c10d._world.group_count
    group = neighbours_group(grid, size)
    return dist.get_process_group_ranks(group) if group else [], dist.distributed_c10d._world.group_count - before


def test_groups_of_neighbours_are_made_by_all_ranks() -> None:
    """On three ranks of four, of which a group may have nobody: NCCL can split a communicator only with all its ranks."""
    found = run_ranks(neighbours, 4, 4, 2)
    assert found == [([0, 1], 2), ([0, 1], 2), ([2, 3], 2), ([2, 3], 2)]
    assert neighbours_group(Grid(tensor=4), 2) is None  # describes a layout only
