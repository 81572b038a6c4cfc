"""On a GPU, asked for with `pytest -m gpu`: a world of one over NCCL, and the CPU's losses. The same functions run here on the CPU too.

benchmarks/gpu.py goes further: checkpoints between devices, generation, speed, kernels.
"""

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.attention import Core
from parallel import collectives, distributed
from parallel.distributed import device
from parallel.grid import Grid
from parallel.object_collectives import all_gather_objects, broadcast_object
from tests.harness import run_on_gpu, run_ranks
from tests.parallel.helpers import training

PAIRS = ("reduce_from_tensor_ranks", "gather_from_tensor_ranks", "scatter_to_tensor_ranks", "gather_sequence", "reduce_scatter_sequence")
LAYOUTS = {f"ZeRO-{stage}": dict(zero_stage=stage, micro=2) for stage in (1, 2, 3)}
LAYOUTS["offload"] = dict(zero_stage=2, offload_optimizer=True)
RELATIVE = {"fp32": 2e-5, "bf16": 2e-2, "fp16": 5e-3}


def collectives_of_one() -> dict[str, bool]:
    """Whether each collective returns its argument, value and gradient, on a world of one, and objects and host tensors travel."""
    x = torch.randn(2, 6, 4, device=device())
    found = {}
    for name in PAIRS:
        leaf = x.clone().requires_grad_()
        y = getattr(collectives, name)(leaf, dist.group.WORLD)
        y.sum().backward()
        found[name] = torch.equal(y, x) and torch.equal(leaf.grad, torch.ones_like(x))
    flag = torch.tensor([5])
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    dist.barrier()
    return found | {"host": flag.tolist() == [5], "objects": broadcast_object("a") == "a" and all_gather_objects(1, Grid()) == [1]}


def deterministic_losses(layout: dict) -> list[float]:
    distributed.use_deterministic_kernels()
    return training.train(5, **layout)["loss"]


def grouped_queries(dtype: str) -> float:
    """The relative difference of attention with shared kv heads, by the memory-efficient kernel on a GPU, from the CPU's own in fp32."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 64, 32, generator=g) for heads in (8, 2, 2))
    core = Core("core", 0.0, 0, Grid())
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    kernel = SDPBackend.EFFICIENT_ATTENTION if device().type == "cuda" else SDPBackend.MATH
    with sdpa_kernel(kernel):  # an error if this kernel cannot take it
        found = core(*(x.to(device(), getattr(torch, dtype)) for x in (q, k, v)), None, None)
    return float((found.float().cpu() - expected).norm() / expected.norm())


@pytest.mark.slow
def test_the_functions_of_this_file_hold_on_a_cpu() -> None:
    """So that a GPU, when there is one, is not wasted on their mistakes."""
    assert all(run_ranks(collectives_of_one, 1)[0].values())
    assert run_ranks(deterministic_losses, 1, {})[0] == run_ranks(training.call, 1, dict(steps=5))[0]["loss"]
    assert grouped_queries("float32") < 1e-6


@pytest.mark.slow
def test_a_process_for_the_gpu_runs_and_reports(tmp_path) -> None:
    assert all(run_on_gpu(collectives_of_one).values())


@pytest.mark.gpu
def test_collectives_over_nccl() -> None:
    assert all(run_on_gpu(collectives_of_one).values())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", RELATIVE)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_losses_are_the_cpus(layout: dict, precision: str) -> None:
    """Overlapping communication and contiguous gradients included, which only GPUs use."""
    (expected,) = run_ranks(training.call, 1, dict(steps=10))
    found = run_on_gpu(training.call, dict(steps=10, precision=precision, **layout))
    assert found["loss"] == pytest.approx(expected["loss"], rel=RELATIVE[precision])


@pytest.mark.gpu
def test_deterministic_kernels_give_the_same_bits() -> None:
    assert run_on_gpu(deterministic_losses, {}) == run_on_gpu(deterministic_losses, {})


@pytest.mark.gpu
def test_shared_kv_heads_in_fp32_use_the_memory_efficient_kernel() -> None:
    assert run_on_gpu(grouped_queries, "float32") < 1e-5
