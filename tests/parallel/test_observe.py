"""What the last stage of each data rank sees is on every rank, in the order of data ranks; a pipeline has its loss function back."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from parallel.grid import Grid, make_grid
from parallel.observe import Kept, everywhere, instead_of_loss
from tests.harness import run_ranks


def told(pipe: int, tensor: int) -> list[list[float]]:
    """Everybody's copy of what last stages saw: ten times their data rank, in bf16."""
    grid = make_grid(pipe, tensor)
    assert grid.world == dist.get_world_size()
    seen = torch.full((2,), 10.0 * grid.data_rank + 1, dtype=torch.bfloat16) if grid.is_last_stage else None
    found = everywhere(seen, (2,), grid, torch.device("cpu"))
    assert found.dtype == torch.float32
    return found.tolist()


@pytest.mark.parametrize(("world", "pipe", "tensor"), [(4, 2, 1), (4, 1, 2), (2, 2, 1), (1, 1, 1)])
def test_every_rank_is_told_what_each_data_rank_saw(world: int, pipe: int, tensor: int) -> None:
    data = world // pipe // tensor
    assert run_ranks(told, world, pipe, tensor) == [[[10.0 * rank + 1] * 2 for rank in range(data)]] * world


def test_a_shape_that_was_not_announced_is_named() -> None:
    with pytest.raises(ValueError, match=r"has the shape \(3,\), \(2,\) was announced"):
        everywhere(torch.zeros(3), (2,), Grid(), torch.device("cpu"))


def test_the_loss_function_is_back_whatever_happens() -> None:
    pipeline, kept = SimpleNamespace(loss_fn="the loss"), Kept(lambda logits: logits + 1)
    with pytest.raises(KeyError), instead_of_loss(pipeline, kept):
        assert pipeline.loss_fn is kept and float(kept(torch.zeros(2), None)) == 0.0
        raise KeyError
    assert pipeline.loss_fn == "the loss" and kept.seen.tolist() == [1.0, 1.0]
