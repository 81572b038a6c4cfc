"""A training job: one run on one rank, resolved and checked before torch is imported, and its description in words.

`resolve` is what a launch does before torch. `describe` gives the lines that a run's header and `--dry-run` show.
"""

import contextlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from models.encoder_config import T5
from models.estimates.parameters import parameters, parameters_on_rank
from parallel.engines.deepspeed_config import derive
from parallel.errors import Mistake
from research import ROOT
from research.cluster.environment import THREADS, Ranks, threads_asked_for, threads_per_rank
from research.cluster.software import library_files
from research.config import Experiment
from research.config.checks import check
from research.config.diff import describe_changes, flatten
from research.config.experiment_folder import LoadedExperiment, check_variants
from research.config.layout import Layout, engine_settings, layout
from research.config.overrides import Options, Override
from research.config.plausibility import contradictions, doubts, doubts_of_ranks, refused_by_wandb
from research.config.serialization import resolved
from research.config.sources import describe_texts
from research.data.prepare import check as check_data
from research.evaluation.in_training import check_tasks
from research.tracking import format as fmt
from research.tracking.acquire_lock import release
from research.tracking.format import compact, plural
from research.tracking.run_lock import RunLock
from research.training.init_from import check_init_from, doubts_of_init_from
from research.training.resume import NEVER, Resume, find
from research.training.sampler import blend_of
from research.training.samples import check_samples


@dataclass(frozen=True)
class Job:
    """An experiment, the folder it was loaded from, how the command line changed it, and the rank that runs it."""

    experiment: Experiment
    folder: Path
    name: str
    overrides: list[Override]
    ranks: Ranks
    layout: Layout
    root: Path
    verbose: bool
    argv: list[str]
    warnings: list[str]
    """Settings that are probably not meant, each a sentence."""
    library: dict[str, str]
    """The SHA-256 of each Python file of the library, by its path from `root`."""
    resume: Resume | None = None
    """The run to resume, as rank 0 found it; None on the other ranks."""
    resume_option: str = NEVER
    """What --resume was given."""
    rehash: bool = False
    """Whether texts and token stores are read whole (--rehash)."""
    why_resumed: str = ""
    """How `--resume` led to this run, or to a new one; '' where it leaves no question."""
    locks: list[RunLock] = field(default_factory=list)
    """The locks that this process holds: of the run, or of those who begin one with `--resume auto`. None on ranks > 0."""

    def close(self) -> None:
        """Gives up all locks. A second call does nothing."""
        release(self.locks)


def resolve(loaded: LoadedExperiment, overrides: list[Override], ranks: Ranks, options: Options, argv: list[str]) -> Job:
    """Checks everything that can be checked without torch and returns the job. Raises a Mistake for what cannot work."""
    experiment = loaded.experiment
    check(experiment, ranks)
    threads_asked_for()  # a wrong number in the environment is reported here
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # any other OSError is a name that no file system takes
        os.stat(ROOT / experiment.track.runs)
    check_variants(loaded.folder, experiment)
    check_data(experiment.data, ROOT, experiment.model.vocab_size)
    blend_of(experiment)  # a Mistake if the weights of sources do not work
    check_init_from(experiment, ROOT)
    check_tasks(experiment, ROOT)
    check_samples(experiment, ROOT)
    wrong = [*contradictions(experiment, ROOT), *refused_by_wandb(experiment, loaded.name)]
    job_layout = layout(experiment, ranks.world)
    settings = engine_settings(experiment, job_layout)
    try:  # a deepspeed={…} table must not contradict the experiment on a CPU and on a GPU: which one this is, only torch knows
        derive(settings, cuda=False)
    except Mistake:
        derive(settings, cuda=True)
    found, why, locks = None, "", list[RunLock]()
    try:
        if ranks.rank == 0:
            runs = ROOT / experiment.track.runs
            found, why = find(options.resume, experiment, loaded.folder, runs, None if options.dry_run else locks)
        # A run that is resumed has begun with these settings, and may not change all of them. Only rank 0 knows whether `auto` found one.
        if wrong and (options.resume == NEVER or (ranks.rank == 0 and found is None)):
            raise Mistake(wrong[0])
    except BaseException:
        release(locks)
        raise
    damaged = [f"{damage} → resumed from {found.checkpoint.name} instead" for damage in found.passed_over.values()] if found else []
    return Job(
        experiment=experiment,
        folder=loaded.folder,
        name=loaded.name,
        overrides=overrides,
        ranks=ranks,
        layout=job_layout,
        root=ROOT,
        verbose=options.verbose,
        argv=argv,
        resume=found,
        resume_option=options.resume,
        rehash=options.rehash,
        why_resumed=why,
        locks=locks,
        library=library_files(ROOT),
        warnings=[
            *damaged,
            *wrong,
            *doubts(experiment),
            *doubts_of_ranks(experiment, ranks),
            *doubts_of_init_from(experiment, ROOT),
        ],
    )


def describe(job: Job, device: str = "", software: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The (label, text) lines of config, machine, layout, batch and model.

    `device` ('cpu', 'NVIDIA H200, 150.1 GB') and `software` ('gloo', 'torch 2.13.0') are known only once torch is imported.
    """
    experiment, ranks, schedule = job.experiment, job.ranks, job.experiment.schedule

    config = str(job.folder.relative_to(job.root) if job.folder.is_relative_to(job.root) else job.folder)
    if job.overrides:
        config += f" + {plural(len(job.overrides), 'override')}: {describe_changes(job.overrides)}"

    nodes = plural(-(-ranks.world // ranks.local_world), "node")
    threads = f"{plural(threads_per_rank(ranks), 'thread')} each" + (f" ({THREADS})" if threads_asked_for() else "")
    machine = [f"{nodes} × {plural(ranks.local_world, 'rank')}", f"{device}, {threads}" if device else threads, *software]
    machine += ["deterministic kernels"] * experiment.deterministic

    stage = " · zero_stage 0 always runs as 1" if experiment.parallel.zero_stage == 0 else ""
    product = f"{schedule.micro_batch_size} micro × {job.layout.micro_batches} accumulated × {job.layout.data} data"
    batch = f"{plural(schedule.batch_size, 'sequence')} = {product} · {job.layout.tokens_per_step:,} tokens a step"
    if schedule.batch_ramp:
        last = job.layout.batch_sizes.phases[-1]
        batch += f" · from {schedule.batch_ramp[0]} sequences on, all of them from step {last.step + 1:,}"
    if schedule.length_ramp:
        full = job.layout.sequence_lengths.phases[-1]
        batch += f" · of {plural(schedule.length_ramp[0], 'token')} at first, {full.length} from step {full.step + 1:,}"
    return [
        ("config", config),
        *([("resume", job.why_resumed)] if job.why_resumed else []),
        ("machine", " · ".join(machine)),
        ("layout", f"{layout_line(experiment, job.layout)} · {experiment.precision}{stage}"),
        ("batch", batch),
        ("model", model_line(experiment, job.layout)),
    ]


def layout_line(experiment: Experiment, layout: Layout) -> str:
    """'pipe 1 × data 1 × tensor 2 · sequence parallel · ZeRO-1 · full recomputation': the layout as it runs."""
    parallel = experiment.parallel
    return fmt.layout(
        layout.pipe,
        layout.data,
        layout.tensor,
        layout.zero_stage,
        sequence=parallel.sequence,
        recompute=parallel.recompute,
        offload_optimizer=parallel.offload_optimizer,
        offload_parameters=parallel.offload_parameters,
    )


def model_line(experiment: Experiment, layout: Layout) -> str:
    """'gpt 4 layers, hidden 192, 6 heads · 3.4 M parameters (1.7 M on each rank)'; '6 heads of 48' if that is not 192 / 6.

    't5 4 + 4 layers' for an encoder's and a decoder's.
    """
    model = experiment.model
    heads = plural(model.num_heads, "head") + (f" ({model.num_kv_heads} kv)" if model.num_kv_heads != model.num_heads else "")
    heads += f" of {model.head_size}" if model.num_heads * model.head_size != model.hidden_size else ""
    layers = plural(model.num_layers, "layer")
    if isinstance(model, T5):
        layers = f"{model.num_encoder_layers} + {layers}"
    shape = f"{model.kind} {layers}, hidden {model.hidden_size}, {heads}"
    total, own = parameters(model), parameters_on_rank(model, layout.tensor)
    if total is None or own is None:
        return f"{shape} · parameters counted once built (variant.py)"
    each = f" ({compact(own)} on each rank)" if layout.tensor > 1 and layout.pipe == 1 else ""
    return f"{shape} · {compact(total)} parameters{each}"


def dry_run(job: Job, commit: str, dirty: bool) -> str:
    """What --dry-run prints: the job in words, then every setting as it would be saved."""
    experiment, schedule, optimizer = job.experiment, job.experiment.schedule, job.experiment.optimizer
    tree = f"{commit} ({'changed' if dirty else 'clean'})" if commit != "unknown" else "no commit"

    tokens = compact(job.layout.tokens_before(schedule.steps))
    rate = f"lr {optimizer.lr:g}, {optimizer.decay}" + (f" to {optimizer.min_lr:g}" if optimizer.decay != "constant" else "")
    warmup = f" after {plural(optimizer.warmup_steps, 'warm-up step')}" if optimizer.warmup_steps else ""
    described = [
        *describe(job),
        ("data", f"{describe_texts(experiment.data.train)} · held out {experiment.data.validation} · {experiment.data.tokenizer}"),
        ("schedule", f"{plural(schedule.steps, 'step')} = {tokens} tokens · {rate}{warmup}"),
    ]
    described += [("warn", warning) for warning in job.warnings]
    lines = [f"{job.name} · dry run · {tree}", *(f"{label:<9}{text}" for label, text in described), ""]

    settings = flatten(resolved(experiment))
    width = max(map(len, settings))
    for name, value in settings.items():
        lines.append(f"{name:<{width}}  {(shlex.join(map(str, value)) or 'none') if isinstance(value, list) else value}")
    return "\n".join(lines) + "\n"
