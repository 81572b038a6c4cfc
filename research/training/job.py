"""A job in words: the lines that answer what is run, on what, cut how, in which batches, how large. Pure; no torch."""
# MERGED-DOC """One run on one rank, resolved: what the part before torch hands to the part after it."""
# MERGED-DOC """What --dry-run prints: the job in words, then every setting as it would be saved. Pure."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.estimates.parameters import parameters, parameters_on_rank
from parallel.engines.deepspeed_config import EngineSettings, derive
from parallel.errors import Mistake
from research import ROOT
from research.cluster.environment import Ranks, threads_per_rank
from research.config import Experiment
from research.config.checks import check
from research.config.diff import flatten
from research.config.experiment_folder import LoadedExperiment, check_variants
from research.config.layout import Layout, engine_settings, layout
from research.config.overrides import Options, Override
from research.config.serialization import resolved
from research.data.prepare import check as check_data
from research.evaluation.in_training import check_tasks as check_exams
from research.tracking.format import compact, plural
from research.training.resume import check_init_from as check_initial
from research.training.resume import find
from research.training.samples import check_samples as check_samples

if TYPE_CHECKING:
    from research.training.resume import Resume


@dataclass(frozen=True)
class Job:
    """An experiment, where it lies, how it was changed, who runs it."""

    experiment: Experiment
    folder: Path
    name: str
    overrides: list[Override]
    ranks: Ranks
    layout: Layout
    root: Path
    verbose: bool
    argv: list[str]
    resume: "Resume | None" = None
    """The run that goes on, as rank 0 found it; None on the other ranks."""


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


def _inside(folder: Path, root: Path) -> Path | str:
    return folder.relative_to(root) if folder.is_relative_to(root) else os.fspath(folder)


def dry_run(job: Job, commit: str, dirty: bool) -> str:
    """The whole text, lines of 'label    text'."""
    tree = f"{commit} ({'changed' if dirty else 'clean'})" if commit != "unknown" else "no commit"
    lines = [f"{job.name} · dry run · {tree}"]
    lines += [f"{label:<9}{text}" for label, text in [*describe(job), *_more(job)]]
    settings = flatten(resolved(job.experiment))
    width = max(map(len, settings))
    lines += ["", *(f"{name:<{width}}  {_written(value)}" for name, value in settings.items())]
    return "\n".join(lines) + "\n"


def _more(job: Job) -> list[tuple[str, str]]:
    experiment, layout = job.experiment, job.layout
    schedule, optimizer = experiment.schedule, experiment.optimizer
    tokens = compact(schedule.steps * layout.tokens_per_step)
    rate = f"lr {optimizer.lr:g}, {optimizer.decay}" + (f" to {optimizer.min_lr:g}" if optimizer.decay != "constant" else "")
    warmup = f" after {plural(optimizer.warmup_steps, 'warm-up step')}" if optimizer.warmup_steps else ""
    return [
        ("data", f"{experiment.data.train} · held out {experiment.data.validation} · {experiment.data.tokenizer}"),
        ("schedule", f"{plural(schedule.steps, 'step')} = {tokens} tokens · {rate}{warmup}"),
    ]


def _written(value: Any) -> str:
    return (shlex.join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def resolve(loaded: LoadedExperiment, overrides: list[Override], ranks: Ranks, options: Options, argv: list[str]) -> Job:
    """Everything that can be checked without torch, checked; then the job."""
    experiment = loaded.experiment
    check(experiment, ranks)
    check_variants(loaded.folder, experiment.model)
    check_data(experiment.data, ROOT, experiment.model.vocab_size)
    check_initial(experiment, ROOT)
    check_exams(experiment, ROOT)
    check_samples(experiment, ROOT)
    found = layout(experiment, ranks.world)
    _check_table(engine_settings(experiment, found))
    return Job(
        experiment=experiment,
        folder=loaded.folder,
        name=loaded.name,
        overrides=overrides,
        ranks=ranks,
        layout=found,
        root=ROOT,
        verbose=options.verbose,
        argv=argv,
        resume=find(options.resume, experiment, loaded.folder, ROOT / experiment.track.runs) if ranks.rank == 0 else None,
    )


def _check_table(settings: EngineSettings) -> None:
    """Refuse a deepspeed={…} that contradicts the experiment on a CPU and on a GPU: which one this is, only torch knows."""
    try:
        derive(settings, cuda=False)
    except Mistake:
        derive(settings, cuda=True)
