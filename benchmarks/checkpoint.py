"""Saving a checkpoint beside plain safetensors + SHA-256 of the same bytes: seconds, and the memory that it takes for a while.

    python benchmarks/checkpoint.py [--layers 8] [--hidden 768] [--ranks 1] [--zero 1] [--tensor 1] [--repetitions 7]

`plain` is safetensors' save_file of each of a rank's files, then the hash of what was written, read back; `plain + fsync` also waits
for the disk, as a checkpoint must. `ours` is Saver.save: the state out of a real engine, hashed while it is written, fsync, manifest,
rename. `background` is how long BackgroundSaver.save holds training up. Ranks work at the same time and the slowest counts. The
ways take turns, so that a machine or a disk whose speed drifts slows all of them; on a busy machine read the CPU times of all ranks
together. Memory is the peak of a rank's resident set above what it held before, the page cache not counted.
"""

import argparse
import hashlib
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from models import gpt
from models.config import GPT
from parallel import distributed
from parallel.checkpoint.reader import Reader
from parallel.checkpoint.saver import BackgroundSaver, Saver
from parallel.checkpoint.sharding import assign_writers, gather_shards, parts_of
from parallel.checkpoint.writer import files_of
from parallel.engines.deepspeed_config import EngineSettings
from parallel.engines.engine import Engine, make_engine
from parallel.engines.optimizer_state import MOMENTS, ensure_moments, fragment
from parallel.grid import make_grid


def engine_of(arguments: argparse.Namespace) -> Engine:
    """A GPT that has not been trained; its weights and moments are noise, so that no page of them is the kernel's zero page."""
    shape = GPT(
        num_layers=arguments.layers,
        hidden_size=arguments.hidden,
        num_heads=12,
        num_kv_heads=12,
        ffn_size=4 * arguments.hidden,
        vocab_size=50257,
        seq_length=1024,
        norm="layernorm",
        norm_eps=1e-5,
        position="learned",
        mlp="gelu_tanh",
        residual="pre_norm",
        init="gpt2",
        bias=True,
        qkv_bias=True,
        qk_norm=False,
        embedding_dropout=0.0,
        residual_dropout=0.0,
        mlp_dropout=0.0,
        attention_dropout=0.0,
        tied=True,
    )
    grid = make_grid(1, arguments.tensor)
    settings = EngineSettings("fp32", arguments.zero, 1, 1, clip=1.0, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    engine = make_engine(gpt.layers(shape, grid, seed=0), gpt.TokenLoss(shape.vocab_size, 0.0, grid.tensor_group), grid, settings)
    ensure_moments(engine)
    for kind in ("weights", *MOMENTS):
        for parameter in engine.parameters.values():
            fragment(parameter, kind).values.normal_()
    return engine


def plain(engine: Engine, wait: bool) -> Callable[[Path], None]:
    """The same bytes in the same files, each by safetensors, then hashed. What it is to write lies in memory before it begins."""
    shares = assign_writers(engine)
    parts = parts_of(engine, shares)
    tensors = iter([tensor.clone() for tensor in gather_shards(engine, shares)])
    files = {name: {part.entry.key: next(tensors) for part in held} for name, held in files_of(parts, engine.grid.rank).items()}

    def save(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for name, held in files.items():
            save_file(held, folder / name)
            with (folder / name).open("rb") as file:
                hashlib.file_digest(file, "sha256").hexdigest()
                if wait:
                    os.fsync(file.fileno())

    return save


def seconds(do: Callable[[Path], None], folder: Path) -> tuple[float, float]:
    """The slowest rank's wall time, and the CPU time of all ranks; the folder is gone afterwards, and its pages are on disk."""
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    do(folder)
    wall, cpu_time = torch.tensor(time.perf_counter() - start), torch.tensor(time.process_time() - cpu)
    dist.all_reduce(wall, op=dist.ReduceOp.MAX)
    dist.all_reduce(cpu_time)
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
        os.sync()
    dist.barrier()
    return float(wall), float(cpu_time)


def extra_memory(do: Callable[[], object]) -> int:
    """Peak resident bytes during `do` above those before it, on the rank where they are most (Linux)."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now
    do()
    extra = torch.tensor(_status("VmHWM") - before)
    dist.all_reduce(extra, op=dist.ReduceOp.MAX)
    return int(extra)


def _status(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


def measure(rank: int, arguments: argparse.Namespace, place: Path) -> None:
    """One rank: all measurements, and on rank 0 their table."""
    torch.set_num_threads(1)
    distributed.start(rank, arguments.ranks, rank, f"file://{place / 'rendezvous'}")
    engine = engine_of(arguments)
    target = place / "run" / "step_000001"
    memory = extra_memory(lambda: Saver().save(target, engine, {"step": 1}))
    with Reader(target) as reader:
        size = sum(file.size for file in reader.manifest.files.values())
        largest = 4 * max(tensor.numel for tensor in reader.tensors.values())
    background = BackgroundSaver()
    held_up: list[tuple[float, float]] = []

    def in_background(folder: Path) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        background.save(folder, engine, {"step": 1})
        held_up.append((time.perf_counter() - start, time.process_time() - cpu))
        background.wait()

    ways: dict[str, Callable[[Path], None]] = {
        "plain": plain(engine, wait=False),
        "plain + fsync": plain(engine, wait=True),
        "ours": lambda folder: Saver().save(folder, engine, {"step": 1}),
        "background, all": in_background,
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    order = list(ways)
    for _ in range(arguments.repetitions):
        for name in order:
            times[name].append(seconds(ways[name], place / "run" / "step_000002"))
        order.append(order.pop(0))  # what comes after what may matter to the page cache
    if rank == 0:
        times["background, held up"] = held_up
        report(arguments, times, size, memory, largest)
    distributed.stop()


def report(arguments: argparse.Namespace, times: dict[str, list[tuple[float, float]]], size: int, memory: int, largest: int) -> None:
    """The table."""
    layout = f"{arguments.ranks} ranks, tensor {arguments.tensor}, ZeRO-{arguments.zero}"
    print(f"{layout}: {size / 1e6:,.0f} MB, median of {arguments.repetitions} (range of the pairs)")
    print("                       seconds     MB/s   wall / plain           wall / plain + fsync   CPU / plain")
    for name, found in times.items():
        told = [ratio(found, times[base], which) for base, which in (("plain", 0), ("plain + fsync", 0), ("plain", 1))]
        median = statistics.median(wall for wall, _ in found)
        print(f"{name:>20}  {median:8.2f}  {size / 1e6 / median:7,.0f}   {'   '.join(told)}")
    print(f"peak extra memory of a rank: {memory / 1e6:,.0f} MB; the largest parameter has {largest / 1e6:,.0f} MB", flush=True)


def ratio(found: list[tuple[float, float]], base: list[tuple[float, float]], which: int) -> str:
    """The median of the pairwise ratios, and their range."""
    pairs = sorted(a[which] / b[which] for a, b in zip(found, base, strict=True))
    return f"{statistics.median(pairs):5.2f} ({pairs[0]:.2f} – {pairs[-1]:.2f})"


def main() -> None:
    """Parses the arguments, runs the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--folder", default=None, help="on the disk to measure (default: the system's temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=measure, args=(rank, arguments, Path(place))) for rank in range(arguments.ranks)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


if __name__ == "__main__":
    main()
