"""A rank's GPU, ranks that share one, process groups with two backends and a timeout: as far as a machine without GPUs can show it."""

import datetime
import os
import tempfile

import pytest
import torch
import torch.distributed as dist

from parallel import distributed
from parallel.distributed import gpu_index, refuse_shared_gpus
from parallel.errors import SharedMistake
from tests.harness import run_ranks
from tests.parallel.helpers import training


@pytest.mark.parametrize(
    ("local_ranks", "visible", "gpus"),
    [(range(4), 4, [0, 1, 2, 3]), (range(8), 1, [0] * 8), (range(2), 8, [0, 1]), (range(4), 2, [0, 1, 0, 1])],
    ids=["every rank sees all", "srun --gpus-per-task=1", "fewer ranks than GPUs", "srun --gpus-per-task=2"],
)
def test_the_gpu_of_a_rank_is_one_that_it_sees(local_ranks: range, visible: int, gpus: list[int]) -> None:
    assert [gpu_index(local_rank, visible) for local_rank in local_ranks] == gpus


def refused(gpus: list[str]) -> tuple[str, bool]:
    """(what is said, whether this rank is the one to say it)"""
    try:
        refuse_shared_gpus(gpus[dist.get_rank()])
    except SharedMistake as mistake:
        return str(mistake), mistake.reports
    return "", False


def test_two_ranks_on_one_gpu_are_refused_on_every_rank() -> None:
    said, reports = zip(*run_ranks(refused, 3, ["GPU-a", "GPU-b", "GPU-a"]), strict=True)
    assert reports == (True, False, False)
    assert len(set(said)) == 1 and said[0].startswith("ranks 0, 2 use the same GPU of ") and "--gpus-per-task=1" in said[0]


def test_on_a_cpu_nothing_is_made_deterministic() -> None:
    """It is so anyway, and torch would then fill memory that nobody reads."""
    distributed.use_deterministic_kernels()
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_nothing_is_left_in_the_environment() -> None:
    """Libraries such as accelerate would take LOCAL_RANK for a launcher's, and wait for the other variables."""
    before = dict(os.environ)
    distributed.start(0, 1, 0, None)
    distributed.stop()
    assert dict(os.environ) == before


def two_backends(folder: str, layout: dict) -> tuple[list[float], list[float], set[float], str]:
    """The losses over gloo alone, and over groups that have a backend per device; the minutes of all groups' timeouts; the backend."""
    alone = training.train(2, **layout)["loss"]
    rank = dist.get_rank()
    distributed.stop()
    distributed.BACKENDS = {"cpu": "cpu:gloo,cuda:gloo"}
    distributed.TIMEOUT = datetime.timedelta(minutes=7)  # neither gloo's own nor NCCL's
    distributed.start(rank, 2, rank, f"file://{folder}/again")
    losses = training.train(2, **layout)["loss"]
    groups = [group._get_backend(torch.device("cpu")) for group in dist.distributed_c10d._world.pg_map if group.size() > 1]
    return alone, losses, {group.options._timeout.total_seconds() / 60 for group in groups}, dist.get_backend()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [dict(pipe=2), dict(zero_stage=3), dict(tensor=2)], ids=["pipeline", "ZeRO-3", "tensor"])
def test_two_backends_per_group_compute_the_same_and_every_group_has_our_timeout(layout: dict) -> None:
    """As on GPUs, where NCCL is the second one. DeepSpeed's own groups count too."""
    with tempfile.TemporaryDirectory() as folder:
        for alone, losses, minutes, backend in run_ranks(two_backends, 2, folder, layout):
            assert losses == alone and minutes == {7.0} and backend == "cpu:gloo,cuda:gloo"
