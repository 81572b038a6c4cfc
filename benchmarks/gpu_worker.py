"""Tasks of benchmarks/gpu.py on one device, in a process of their own: `python benchmarks/gpu_worker.py TASKS.json`.

The file is a list of what to do ({"task": "train", …}: the arguments of the function `train`). A list of what was found replaces it, with
{"error": traceback} for a task that failed. They run on the GPU that the process sees, else on the CPU. In a process of their own,
because an error of CUDA spoils every later call of its process.
"""

import gc
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from parallel import distributed

CUDA = torch.cuda.is_available()


def machine() -> dict[str, Any]:
    """The device and the versions of what computes on it."""
    found: dict[str, Any] = {"cuda": CUDA, "device": distributed.device_name(), "torch": torch.__version__}
    if CUDA:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "name": properties.name,
            "gpus": torch.cuda.device_count(),
            "memory_gb": properties.total_memory / 1e9,
            "capability": list(torch.cuda.get_device_capability()),
            "cuda_version": torch.version.cuda,
            "backends": distributed.backend_versions(),
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
    return found


def shape_of(small: bool, **settings: Any):
    """A GPT-2 of 124 M parameters, or one that a CPU trains in seconds. `settings` change it."""
    from models.config import GPT

    sizes = {"num_layers": 3, "hidden_size": 96, "num_heads": 4, "ffn_size": 256, "vocab_size": 1000, "seq_length": 64}
    if not small:
        sizes = {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "ffn_size": 3072, "vocab_size": 50304, "seq_length": 1024}
    fixed = {"norm": "layernorm", "norm_eps": 1e-5, "position": "learned", "mlp": "gelu_tanh", "residual": "pre_norm", "init": "gpt2"}
    dropout = dict.fromkeys(("embedding_dropout", "residual_dropout", "mlp_dropout", "attention_dropout"), 0.0)
    whole = {**sizes, **fixed, **dropout, "bias": True, "qkv_bias": True, "qk_norm": False, "tied": True, **settings}
    return GPT(**{"num_kv_heads": whole["num_heads"], **whole})


def batch_of(shape, step: int, size: int):
    """A micro-batch that can be learned: every text counts upwards in threes from a random token."""
    from parallel.engines.micro_batch import MicroBatch

    first = torch.randint(0, shape.vocab_size, (size, 1), generator=torch.Generator().manual_seed(step))
    tokens = (first + 3 * torch.arange(shape.seq_length + 1)) % shape.vocab_size
    weights = torch.full((size, shape.seq_length), 1 / (size * shape.seq_length))
    return MicroBatch(tokens[:, :-1], (tokens[:, 1:], weights), {"samples": step * size + torch.arange(size)})


def make(precision: str, zero: int, small: bool, size: int, micro_batches: int, offload: bool = False, **settings: Any):
    """(engine, shape) on this world of one rank."""
    from models import gpt
    from parallel.engines.deepspeed_config import EngineSettings
    from parallel.engines.engine import make_engine
    from parallel.grid import make_grid

    shape, grid = shape_of(small, **settings), make_grid(1, 1)
    # eps = 1e-3: at 1e-8 a rounding error of a gradient near zero becomes a whole step (CONTRIBUTING.md).
    derived = EngineSettings(
        precision,
        zero,
        size,
        micro_batches,
        clip=1.0,
        lr=3e-3,
        betas=(0.9, 0.95),
        eps=1e-3,
        weight_decay=0.1,
        offload_optimizer=offload,
        offload_parameters=offload and zero == 3,
    )
    loss = gpt.TokenLoss(shape.vocab_size, 0.0, grid.tensor_group)
    return make_engine(gpt.layers(shape, grid, seed=1), loss, grid, derived), shape


def train(
    precision: str = "fp32",
    zero: int = 1,
    steps: int = 20,
    small: bool = True,
    size: int = 8,
    micro_batches: int = 2,
    offload: bool = False,
    deterministic: bool = False,
    load: str | None = None,
    save: str | None = None,
    settings: dict | None = None,
) -> dict[str, Any]:
    """Losses, norms, the SHA-256 of the final weights, seconds per step (the first three left out) and peak memory.

    `load`: a checkpoint to go on from, up to step `steps`; `save`: where to save after the last one.
    """
    from parallel.checkpoint.load import load_checkpoint
    from parallel.checkpoint.saver import Saver

    if deterministic:
        distributed.use_deterministic_kernels()
    distributed.start(0, 1, 0, None)
    engine, shape = make(precision, zero, small, size, micro_batches, offload, **(settings or {}))
    found: dict[str, Any] = {"loss": [], "norm": []}
    first = load_checkpoint(Path(load), engine)["step"] if load else 0
    if load:
        found["loaded"] = digest(engine)
    began, measured = 0.0, 0
    for step in range(first, steps):
        if step - first == min(3, steps - first - 1):
            began, measured = time.perf_counter(), steps - step
        batches = [batch_of(shape, step * micro_batches + i, size) for i in range(micro_batches)]
        found["loss"].append(engine.train_batch(batches, 3e-3 * min(1.0, (step + 1) / 10)))
        found["norm"].append(engine.gradient_norm())
    found["seconds_per_step"] = (time.perf_counter() - began) / max(measured, 1)
    found["tokens_per_second"] = size * micro_batches * shape.seq_length / found["seconds_per_step"]
    found["parameters"] = sum(p.numel() for p in engine.parameters.values()) if zero < 3 else 0
    if CUDA:
        statistics = torch.cuda.memory_stats()
        found["peak_allocated_mb"] = torch.cuda.max_memory_allocated() / 1e6
        found["peak_reserved_mb"] = torch.cuda.max_memory_reserved() / 1e6
        found["allocation_retries"] = statistics.get("num_alloc_retries", 0)
    if save:
        Saver().save(Path(save), engine, {"step": steps})
    found["weights"] = digest(engine)
    distributed.stop()
    return found


def digest(engine) -> str:
    """A SHA-256 of all fp32 master weights."""
    import hashlib

    sha256 = hashlib.sha256()
    for name, weight in engine.full_weights():
        sha256.update(name.encode() + weight.contiguous().numpy().tobytes())
    return sha256.hexdigest()[:16]


def collectives() -> dict[str, Any]:
    """In a world of one, each collective returns what it was given: whether it does, for tensors on the device, objects and integers."""
    from parallel import collectives as ours
    from parallel.grid import Grid
    from parallel.object_collectives import all_gather_objects, broadcast_object

    distributed.start(0, 1, 0, None)
    group, device = dist.group.WORLD, distributed.device()
    x = torch.randn(4, 6, 8, device=device)
    found = {"backend": dist.get_backend(), "device": str(device)}
    for name in (
        "copy_to_tensor_ranks",
        "reduce_from_tensor_ranks",
        "gather_from_tensor_ranks",
        "scatter_to_tensor_ranks",
        "gather_shared",
    ):
        found[name] = same(getattr(ours, name), x, group)
    for name in ("gather_sequence", "reduce_scatter_sequence", "scatter_sequence", "join_sequence"):
        found[name] = same(getattr(ours, name), x, group)
    found["object"] = broadcast_object("text") == "text" and all_gather_objects([1, "a"], Grid()) == [[1, "a"]]
    flag = torch.tensor([3])  # on the host, as the flag to stop is
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    found["flag on the host"] = flag.tolist() == [3]
    dist.barrier()
    distributed.stop()
    return found


def same(collective, x: torch.Tensor, group) -> bool:
    """Whether value and gradient pass through unchanged."""
    leaf = x.clone().requires_grad_()
    y = collective(leaf, group)
    (y * 2).sum().backward()
    return torch.equal(y, x) and torch.equal(leaf.grad, torch.full_like(x, 2.0))


def generate(small: bool = True, precision: str = "fp32", prompts: int = 4, tokens: int = 32) -> dict[str, Any]:
    """The ids that greedy decoding writes after `prompts` prompts, and tokens per second. Weights are drawn from a seed."""
    from models import gpt
    from models.inference.decoder import Decoder
    from parallel.grid import Grid
    from parallel.layers import PlainModule
    from research.generation.batching import BatchScheduler, Request

    shape = shape_of(small, init="small_wang")
    place = distributed.device()
    module = PlainModule(gpt.layers(shape, Grid(), seed=3)).to(place, distributed.PRECISIONS[precision])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(5.0)  # so that no two logits are nearly equal
    scheduler = BatchScheduler(Decoder(module, shape, Grid(), prompts, shape.seq_length), shape.vocab_size)
    began = time.perf_counter()
    asked = [scheduler.submit(Request(tuple(range(1 + i, 9 + i)), tokens)) for i in range(prompts)]
    while scheduler:
        scheduler.step()
    return {"ids": [one.ids for one in asked], "tokens_per_second": prompts * tokens / (time.perf_counter() - began)}


def profile(small: bool = False, precision: str = "bf16", size: int = 8, steps: int = 3) -> dict[str, Any]:
    """What a GPU does in a step: the kernels with the most time, the longest pauses between two of them, and every wait of the host."""
    import warnings
    from collections import Counter

    from torch.profiler import ProfilerActivity

    distributed.start(0, 1, 0, None)
    engine, shape = make(precision, 1, small, size, 2)

    def step(number: int) -> None:
        engine.train_batch([batch_of(shape, 2 * number + i, size) for i in range(2)], 1e-3)

    for number in range(3):
        step(number)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step(3)
        torch.cuda.set_sync_debug_mode("default")
    sites = Counter(f"{Path(wait.filename).name}:{wait.lineno}" for wait in waits if "synchroniz" in str(wait.message))
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for number in range(4, 4 + steps):
            step(number)
        torch.cuda.synchronize()
    distributed.stop()
    # An annotation spans kernels and is none.
    on_gpu = [e for e in recorded.events() if e.device_type.name == "CUDA" and not getattr(e, "is_user_annotation", False)]
    kernels = [(e.time_range.start, e.time_range.end, e.name) for e in on_gpu]
    return {"waits of the host per step": dict(sites), **timeline(kernels, steps)}


def timeline(kernels: list[tuple[float, float, str]], steps: int) -> dict[str, Any]:
    """(start, end, name) of kernels in µs -> the share of time in which one runs, the longest pauses, and the kernels with most time."""
    kernels = sorted(kernels)
    busy, end, last, gaps, totals = 0.0, kernels[0][0], "", [], {}
    for start, stop, name in kernels:
        if start > end:
            gaps.append({"us": round(start - end, 1), "after": last, "before": name[:80]})
        busy += max(0.0, stop - max(start, end))
        end, last = (stop, name[:80]) if stop > end else (end, last)
        totals[name[:80]] = totals.get(name[:80], 0.0) + stop - start
    most = sorted(totals.items(), key=lambda item: -item[1])
    return {
        "busy": round(busy / (end - kernels[0][0]), 4),
        "kernels per step": len(kernels) / steps,
        "longest pauses": sorted(gaps, key=lambda gap: -gap["us"])[:10],
        "most time, us per step": {name: round(total / steps, 1) for name, total in most[:20]},
    }


TASKS = {task.__name__: task for task in (machine, train, collectives, generate, profile)}


def main() -> None:
    """Runs the tasks that the file lists, in order, and writes what they found into the same file."""
    path = Path(sys.argv[1])
    found = []
    for arguments in json.loads(path.read_text()):
        gc.collect()  # DeepSpeed's engines are cycles: the memory of the task before is freed only here
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        task = TASKS[arguments.pop("task")]
        try:
            found.append(task(**arguments))
        except Exception:  # whatever it is, the next task is tried
            found.append({"error": traceback.format_exc()[-3000:]})
            distributed.stop()
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
