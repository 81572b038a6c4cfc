"""A job in words: the lines that answer what is run, on what, cut how, in which batches, how large. Pure; no torch."""

import os
from collections.abc import Sequence
from pathlib import Path

from models.count import parameters, parameters_on_rank
from research.job import Job
from research.machine import threads_per_rank

SCALES = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))


def describe(job: Job, device: str = "", software: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(label, text) of config, machine, layout, batch and model.

    `device` ('cpu') and `software` ('gloo', 'torch 2.13.0') are what only the part after torch knows.
    """
    return [
        ("config", config_line(job)),
        ("machine", machine_line(job, device, software)),
        ("layout", layout_line(job)),
        ("batch", batch_line(job)),
        ("model", model_line(job)),
    ]


def config_line(job: Job) -> str:
    """'experiments/gpt_sotu + 1 override: parallel.tensor 1 → 2'."""
    folder = str(_inside(job.folder, job.root))
    if not job.overrides:
        return folder
    changes = ", ".join(f"{name} {old} → {new}" for name, old, new in job.overrides)
    return f"{folder} + {plural(len(job.overrides), 'override')}: {changes}"


def machine_line(job: Job, device: str = "", software: Sequence[str] = ()) -> str:
    """'1 node × 2 ranks · cpu, 1 thread each · gloo · torch 2.13.0'."""
    ranks = job.ranks
    nodes = -(-ranks.world // ranks.local_world)
    threads = f"{plural(threads_per_rank(ranks), 'thread')} each"
    place = f"{plural(nodes, 'node')} × {plural(ranks.local_world, 'rank')}"
    return " · ".join([place, f"{device}, {threads}" if device else threads, *software])


def layout_line(job: Job) -> str:
    """'pipe 1 × data 1 × tensor 2 · sequence parallel · ZeRO-1 · fp32 · full recomputation'."""
    layout, parallel = job.layout, job.experiment.parallel
    words = [f"pipe {layout.pipe} × data {layout.data} × tensor {layout.tensor}"]
    words += ["sequence parallel"] * (parallel.sequence and layout.tensor > 1)
    words += [f"ZeRO-{layout.zero_stage}" + (" (stage 0 always runs as 1)" if parallel.zero_stage == 0 else "")]
    offload = [what for what in ("optimizer", "parameters") if getattr(parallel, f"offload_{what}")]
    words += [f"{' and '.join(offload)} in host memory"] * bool(offload)
    words += [job.experiment.precision]
    words += [f"{parallel.recompute} recomputation"] * (parallel.recompute != "none")
    return " · ".join(words)


def batch_line(job: Job) -> str:
    """'16 sequences = 8 micro × 2 accumulated × 1 data · 2,048 tokens a step'."""
    schedule, layout = job.experiment.schedule, job.layout
    product = f"{schedule.micro_batch_size} micro × {layout.micro_batches} accumulated × {layout.data} data"
    return f"{plural(schedule.batch_size, 'sequence')} = {product} · {layout.tokens_per_step:,} tokens a step"


def model_line(job: Job) -> str:
    """'gpt 4 layers, hidden 192, 6 heads · 3.4 M parameters (1.7 M on each rank)'."""
    model, layout = job.experiment.model, job.layout
    heads = plural(model.num_heads, "head") + (f" ({model.num_kv_heads} kv)" if model.num_kv_heads != model.num_heads else "")
    shape = f"gpt {plural(model.num_layers, 'layer')}, hidden {model.hidden_size}, {heads}"
    total, own = parameters(model), parameters_on_rank(model, layout.tensor)
    if total is None or own is None:
        return f"{shape} · parameters counted once built (variant.py)"
    each = f" ({compact(own)} on each rank)" if layout.tensor > 1 and layout.pipe == 1 else ""
    return f"{shape} · {compact(total)} parameters{each}"


def compact(n: int) -> str:
    """3,369,792 -> '3.4 M'; 999 -> '999'."""
    for scale, letter in SCALES:
        if n >= scale:
            return f"{n / scale:.1f} {letter}"
    return str(n)


def plural(n: int, noun: str) -> str:
    """'1 rank', '2 ranks', '1,000 ranks'."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _inside(folder: Path, root: Path) -> Path | str:
    return folder.relative_to(root) if folder.is_relative_to(root) else os.fspath(folder)
