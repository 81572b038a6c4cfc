"""Set-up of a training run before its first step: run folder, text, engine, tracker, and the preflight checks that ranks make together.

Every function is collective. `prepare_run` is the whole of it; the preflight refuses a run whose ranks disagree about what they
train, or whose disk has no room for the first checkpoint.
"""

import functools
import json
import logging
import math
import random
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import gpt
from parallel.checkpoint.load import load_checkpoint, load_initial
from parallel.distributed import device
from parallel.engines import process_state
from parallel.engines.engine import Engine, make_engine
from parallel.errors import Mistake
from parallel.files import free_bytes, megabytes, write_json
from parallel.grid import Grid
from parallel.object_collectives import all_gather_objects, broadcast_object, together
from parallel.slices import slice_of
from research.cluster.environment import code_digest, git_state
from research.cluster.world import software
from research.config import serialization
from research.config.diff import Change, describe_changes
from research.config.experiment_folder import load_variants
from research.config.layout import engine_settings
from research.config.plausibility import doubts_of_text
from research.config.serialization import config_hash
from research.data import prepare
from research.data.batches import epochs
from research.data.prepare import Corpus, HeldOut
from research.evaluation import in_training
from research.evaluation.in_training import PreparedTask
from research.reliability.watchdog import Watchdog
from research.tracking import format as fmt
from research.tracking import run_folder, wandb_client
from research.tracking.console import Console
from research.tracking.own_runs import mark_as_own
from research.tracking.run_folder import RunFolder
from research.tracking.tracker import Tracker
from research.training import components, resume, samples
from research.training.anomalies import AnomalyMonitor
from research.training.checkpointer import Checkpointer, refuse_other_data
from research.training.job import Job, describe, layout_line
from research.training.meter import Meter
from research.training.periodic import Periodic
from research.training.state import Run

STATE_BYTES = 12
"""Bytes per parameter in a checkpoint: its fp32 weight and Adam's two moments."""


@dataclass(frozen=True)
class Resumed:
    """A run that is resumed, as every rank knows it."""

    folder: RunFolder
    checkpoint: Path
    step: int
    changes: list[Change]
    """The settings that differ from the checkpoint's."""

    def line(self, facts: dict[str, Any], job: Job, engine: Engine, variants: Mapping[str, Any]) -> str:
        """'step 120 of gpt_sotu-7f3a2c, step_000120 · bit for bit as if it had never stopped', or what else it is, and the changes."""
        layout_and_machine = process_state.differences(facts, engine)
        same_code = facts["code"] == code_digest(job.root) if "code" in facts else None
        kind = engine.device.type
        how = resume.continuation(facts["step"], self.changes, job.experiment, layout_and_machine, same_code, kind, variants)
        words = [f"step {facts['step']} of {self.folder.title}, {self.checkpoint.name}", how]
        return " · ".join([*words, *([describe_changes(self.changes)] if self.changes else [])])


def agree_on_resume(job: Job) -> Resumed | None:
    """What rank 0 decided before torch was imported, on every rank."""
    resume, decided = job.resume, None
    if resume:
        decided = [str(resume.folder.path), str(resume.checkpoint), resume.step, resume.changed]
    decided = json.loads(broadcast_object(json.dumps(decided)))
    if not decided:
        return None
    folder, checkpoint, step, changes = decided
    return Resumed(RunFolder(Path(folder)), Path(checkpoint), step, [(name, then, now) for name, then, now in changes])


def open_folder(job: Job, resumed: Resumed | None) -> RunFolder:
    """The run's folder, with config.json, source/ and run.json: created or reopened by rank 0 and known to all. Opens this rank's log."""
    experiment, rank = job.experiment, job.ranks.rank
    commit, dirty = git_state(job.root)
    facts: dict[str, Any] = {
        "layout": layout_line(experiment, job.layout),
        "precision": experiment.precision,
        "steps": experiment.schedule.steps,
        "overrides": [[name, str(old), str(new)] for name, old, new in job.overrides],
        "commit": commit,
        "dirty": dirty,
    }
    if resumed:
        folder = resumed.folder
        if rank == 0:
            run_folder.reopen(folder, resumed.step, {"started": run_folder.now(), "checkpoint": resumed.checkpoint.name, **facts})
            serialization.save(experiment, folder.config)
    else:
        path = str(run_folder.create(job.root / experiment.track.runs, job.name).path) if rank == 0 else ""
        folder = RunFolder(Path(broadcast_object(path)))
        if rank == 0:
            serialization.save(experiment, folder.config)
            run_folder.start(folder, source=run_folder.keep_source(folder, job.folder), **facts)
    if rank == 0:
        mark_as_own(folder)
    # Log records and warnings go into the run folder instead of between the lines of the terminal.
    log_format = "%(asctime)s %(name)s %(levelname)s %(message)s"
    logging.basicConfig(filename=folder.rank_log(rank), level=logging.INFO, format=log_format)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    return folder


def header(job: Job, folder: RunFolder, console: Console) -> None:
    """Shows the run's title and what was resolved."""
    commit, dirty = git_state(job.root)
    title = f"{job.name} · run {folder.title} · {commit} ({'dirty' if dirty else 'clean'}) · {folder.shown}"
    console.header([("", title), *describe(job, device().type, software())])
    for warning in job.warnings:
        console.warn(warning, in_header=True)


def prepare_run(
    job: Job, folder: RunFolder, grid: Grid, console: Console, resumed: Resumed | None, watch: Watchdog
) -> tuple[Run, AnomalyMonitor, Periodic, Checkpointer]:
    """The run before its first step. A signal ends it at once until everything is there; from then on it waits for the end of a step."""
    experiment = job.experiment
    with watch.progress.work("preparing the text"), together(grid):  # a rank may be the only one that finds its text wrong
        show = functools.partial(console.progress, unit="characters")
        corpus = prepare.load(experiment.data, job.root, experiment.model.vocab_size, show)
        text = prepare.held_out(corpus, experiment.schedule.validate_tokens)
        if not resumed:
            prepare.refuse_same_text(experiment.data, corpus)
        show_data(job, corpus, text, console)
        prompts = samples.prompts_of(experiment, corpus)
        tasks = in_training.prepare_tasks(experiment, job.root, corpus.tokenizer, show)
    watch.progress.advance("building the engine")
    variants = load_variants(job.folder, experiment)
    engine = build_engine(job, grid, variants)
    preflight(job, folder, corpus, engine, tasks)
    seed_generators(experiment.seed, grid)
    facts: dict[str, Any] | None = None
    with watch.progress.work("reading the checkpoint"):
        if resumed:
            with console.progress("reading the checkpoint", announced=False):
                facts = load_checkpoint(resumed.checkpoint, engine)
            refuse_other_data(facts, corpus.fingerprint, resumed.checkpoint)
            console.header([("resume", resumed.line(facts, job, engine, variants))])
        elif path := resume.init_from_path(experiment, job.root):
            console.header([("weights", f"{experiment.init_from} · step {load_initial(path, engine)['step']}")])
    watch.progress.advance("starting the tracker")
    tracker = open_tracker(job, folder, engine, console, resumed)
    meter = Meter(job.layout.tokens_per_step)
    run = Run(job, folder, variants, corpus, engine, tracker, console, meter, watch.note_signals(), watch.progress)
    anomalies, periodic = AnomalyMonitor(experiment, engine, corpus, folder, console), Periodic(run, text, tasks, prompts)
    checkpointer = Checkpointer(run, anomalies, periodic)
    if facts:
        checkpointer.restore(facts)
    return run, anomalies, periodic, checkpointer


def show_data(job: Job, corpus: Corpus, text: HeldOut, console: Console) -> None:
    """Shows the texts, the tokenizer and their sizes, and warns of what does not fit together and only the texts can tell."""
    data, schedule = job.experiment.data, job.experiment.schedule
    seen = epochs(corpus.train, job.experiment.model.seq_length, schedule.steps * schedule.batch_size)
    sizes = f"{fmt.count(corpus.train.num_tokens)} train, {fmt.count(corpus.validation.num_tokens)} validation tokens"
    if text.tokens < corpus.validation.num_tokens - 1:
        sizes += f" (of which the first {fmt.count(text.tokens)} are predicted)"
    console.header([("data", f"{data.train} · {corpus.tokenizer.name} · {sizes} · {schedule.steps} steps = {seen:.2f} epochs")])
    for warning in doubts_of_text(job.experiment, corpus.tokenizer.vocab_size, text.tokens, job.layout.tokens_per_step):
        console.warn(warning, in_header=True)


def build_engine(job: Job, grid: Grid, variants: Mapping[str, Any]) -> Engine:
    """The model on its DeepSpeed engine. `variants`: what the experiment names of its variant.py."""
    experiment, model = job.experiment, job.experiment.model
    layers = gpt.layers(model, grid, experiment.seed, variants, experiment.parallel.recompute)
    loss = components.training_loss(experiment, grid.tensor_group, variants)
    held_out_loss = components.held_out_loss(experiment, grid.tensor_group)
    settings = engine_settings(experiment, job.layout, components.optimizer_class(experiment, variants))
    return make_engine(layers, loss, grid, settings, held_out_loss)


def seed_generators(seed: int, grid: Grid) -> None:
    """Seeds Python's, numpy's and torch's generators for a variant that draws from them. Tessera itself draws nothing while it trains.

    The ranks of one tensor group are seeded alike: outside of sliced regions they compute the same.
    """
    rank_seed = seed * 1_000_003 + grid.pipe_rank * grid.data + grid.data_rank
    random.seed(rank_seed)
    np.random.seed(rank_seed % 2**32)
    torch.manual_seed(rank_seed)


def open_tracker(job: Job, folder: RunFolder, engine: Engine, console: Console, resumed: Resumed | None) -> Tracker:
    """The run's tracker, quiet on ranks > 0, with everything that W&B is told of the run. Rank 0 writes deepspeed.json beside it."""
    description = None
    if job.ranks.rank == 0:
        write_json(folder.deepspeed, engine.config)
        description = wandb_client.describe(folder)
    tracker = Tracker(folder, description, job.experiment.track.mode, after=resumed.step if resumed else 0)
    console.header([("tracking", tracker.line)])
    show_notes(tracker, console)
    return tracker


def show_notes(tracker: Tracker, console: Console) -> None:
    """Shows what went wrong with W&B since the last call, each sentence once."""
    while tracker.notes:
        console.warn(tracker.notes.pop(0))


def preflight(job: Job, folder: RunFolder, corpus: Corpus, engine: Engine, tasks: Sequence[PreparedTask] = ()) -> None:
    """Refuses a run that could not keep what it learns. Every rank raises the same Mistake."""
    refuse_disagreement(claims(job, corpus) | {f"the data of task {task.task.name!r}": task.digest for task in tasks}, engine)
    own = sum(math.prod(slice_of(parameter).shape) for name, parameter in engine.parameters.items() if engine.owns(name))
    whole_model = sum(dict(all_gather_objects((engine.grid.pipe_rank, own), engine.grid)).values())  # a tied table counts once
    reason = disk_trouble(folder, whole_model * STATE_BYTES) if engine.grid.rank == 0 else None
    if reason := all_gather_objects(reason, engine.grid)[0]:
        raise Mistake(reason)


def claims(job: Job, corpus: Corpus) -> dict[str, str]:
    """What this rank is about to train, by the words for it. All ranks must claim the same."""
    commit, dirty = git_state(job.root)
    return {
        "the configuration": config_hash(job.experiment),
        "the code": f"{commit}{' and changes' if dirty else ''}",
        "the initial weights": resume.init_from_digest(job.experiment, job.root),
        "the data": json.dumps(corpus.fingerprint, sort_keys=True),
        "the seed": str(job.experiment.seed),
    }


def refuse_disagreement(own_claims: dict[str, str], engine: Engine) -> None:
    """Raises a Mistake that names the first rank whose claims differ from rank 0's, the claim, and both values."""
    first, *others = all_gather_objects(own_claims, engine.grid)
    for rank, claimed in enumerate(others, 1):
        for what, expected in first.items():
            if claimed.get(what) != expected:
                raise Mistake(
                    f"rank {rank} disagrees about {what}: {claimed.get(what)}, rank 0 has {expected} → "
                    "give all nodes the same tree, data and command"
                )


def disk_trouble(folder: RunFolder, need: int) -> str | None:
    """Why the run's folder cannot take a checkpoint of `need` bytes; None where it can."""
    probe = folder.checkpoints / f".{uuid.uuid4().hex}.probe"
    try:
        probe.write_bytes(b"?")
        probe.unlink()
    except OSError as error:
        return f"{folder.checkpoints} cannot be written ({error.strerror}) → set track.runs to a folder you may write"
    free = free_bytes(folder.checkpoints)
    if free is not None and free < need:
        have = f"the disk of {folder.checkpoints} has {megabytes(free)} free"
        return f"a checkpoint needs {megabytes(need)}, {have} → make room, or set track.runs to another disk"
    return None
