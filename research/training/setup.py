"""Set-up of a training run before its first step: run folder, text, engine, tracker, and the preflight checks that ranks make together.

In the order of the training loop: `meet` waits for the ranks and refuses those that disagree, `open_folder` makes or reopens the run's
folder, `prepare_run` makes everything else, and refuses a run whose disk has no room for its checkpoints. All of them are collective.
"""

import functools
import hashlib
import json
import logging
import math
import random
import socket
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import gpt
from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.folder import MANIFEST
from parallel.checkpoint.load import load_initial
from parallel.distributed import device_name
from parallel.engines import process_state
from parallel.engines.engine import Engine, make_engine
from parallel.errors import SharedMistake
from parallel.files import FULL, free_bytes, megabytes, write_json
from parallel.grid import Grid
from parallel.object_collectives import all_gather_objects, broadcast_object, together
from parallel.slices import slice_of
from research.cluster import agreement
from research.cluster.agreement import Claims
from research.cluster.environment import git_state
from research.cluster.exit_codes import DISK, WRONG
from research.cluster.memory import HostMemory
from research.cluster.rendezvous import Rendezvous
from research.cluster.software import digest_of, experiment_files
from research.cluster.world import software
from research.config import serialization
from research.config.diff import describe_changes, flatten
from research.config.experiment_folder import load_variants
from research.config.layout import engine_settings
from research.config.plausibility import doubts_of_text
from research.data import prepare
from research.data.batches import epochs
from research.data.prepare import Corpus, HeldOut
from research.evaluation import in_training
from research.evaluation.in_training import PreparedTask
from research.reliability.watchdog import Watchdog
from research.tracking import format as fmt
from research.tracking import run_folder, segments, wandb_client
from research.tracking.console import Console
from research.tracking.own_runs import is_own, mark_as_own
from research.tracking.run_folder import RunFolder
from research.tracking.run_lock import RunLock
from research.tracking.tracker import Tracker
from research.training import components, holding, resume, room, samples
from research.training.anomalies import AnomalyMonitor
from research.training.checkpointer import Checkpointer, refuse_other_data
from research.training.fallback import Start, load_newest_whole
from research.training.holding import Holding
from research.training.job import Job, describe, layout_line
from research.training.meter import Meter
from research.training.periodic import Periodic
from research.training.state import Run

STATE_BYTES = 12
"""Bytes per parameter in a checkpoint: its fp32 weight and Adam's two moments."""


def resume_line(start: Start, facts: dict[str, Any], job: Job, engine: Engine, variants: Mapping[str, Any]) -> str:
    """'step 120 of gpt_sotu-7f3a2c, step_000120 · bit for bit as if it had never stopped', or what else it is, and the changes."""
    layout_and_machine = process_state.differences(facts, engine)
    same_code = facts["code"] == digest_of(job.library) if "code" in facts else None
    kind = engine.device.type
    how = resume.continuation(facts["step"], start.changes, job.experiment, layout_and_machine, same_code, kind, variants)
    words = [f"step {facts['step']} of {start.folder.title}, {start.checkpoint.name}", how]
    return " · ".join([*words, *([describe_changes(start.changes)] if start.changes else [])])


def meet(job: Job, console: Console, watch: Watchdog) -> tuple[Job, Mapping[str, Any], Rendezvous | None]:
    """Waits for all ranks, and refuses a launch whose ranks do not agree, before a process group or a model is made.

    Returns the job, with the warnings that concern all hosts, what it names of variant.py, and where the ranks have met: None for a
    world of one.
    """
    ranks, experiment = job.ranks, job.experiment
    if ranks.world == 1:
        return job, load_variants(job.folder, experiment), None
    with watch.progress.work("meeting the other ranks"):
        rendezvous = Rendezvous.open(ranks, experiment.watch.rendezvous_seconds, console.warn)
        with rendezvous.telling():
            rendezvous.arrive()
            variants = load_variants(job.folder, experiment)
            warnings = agreement.agree(rendezvous, claims(job, rendezvous.host))
            agreement.check_shared_folder(rendezvous, job.root / experiment.track.runs, "track.runs")
            check_shared_checkpoint(rendezvous, job)
    return replace(job, warnings=[*job.warnings, *warnings]), variants, rendezvous


def claims(job: Job, host: str) -> Claims:
    """What this rank is about to train, and with what. All ranks must claim the same."""
    return agreement.claims_of(
        job.ranks,
        host,
        settings=flatten(serialization.resolved(job.experiment)),
        options={"--resume": job.resume_option},
        weights={"the initial weights": resume.init_from_digest(job.experiment, job.root)},
        library=job.library,
        experiment=experiment_files(job.folder),
    )


def check_shared_checkpoint(rendezvous: Rendezvous, job: Job) -> None:
    """Every rank raises a SharedMistake unless all of them see the checkpoint that rank 0 resumes from, the same one. Collective."""
    found = str(job.resume.checkpoint) if job.resume else ""
    checkpoint = rendezvous.decide("checkpoint", found, lambda values: values[0])
    if not checkpoint:
        return
    path = Path(checkpoint) / MANIFEST
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    own = Claims(job.ranks.rank, rendezvous.host, named={"checkpoint": {str(path): digest}})
    agreement.refuse_disagreement(rendezvous, "the checkpoint's manifest", own)


def agree_on_resume(job: Job) -> Start | None:
    """What rank 0 decided before torch was imported, on every rank."""
    resume, decided = job.resume, None
    if resume:
        decided = [str(resume.folder.path), str(resume.checkpoint), resume.step, resume.changed]
    decided = json.loads(broadcast_object(json.dumps(decided)))
    if not decided:
        return None
    folder, checkpoint, step, changes = decided
    return Start(RunFolder(Path(folder)), Path(checkpoint), step, [(name, then, now) for name, then, now in changes])


def open_folder(job: Job, grid: Grid, resumed: Start | None) -> Holding:
    """The run's folder and its lock, created or reopened by rank 0, and this rank's log. Collective.

    If it fails on one rank, every rank raises a SharedMistake, and the folder of a new run is removed.
    """
    lock = None
    with together(grid):
        if job.ranks.rank == 0:
            lock = begin_folder(job, resumed)
    held = holding.share(lock, job.experiment)
    try:
        with together(grid), holding.disk_errors(held.folder.path, lambda: resumed is not None):
            open_log(held.folder, job.ranks.rank)
    except Exception:
        if not resumed:
            held.discard()
        raise
    return held


def begin_folder(job: Job, resumed: Start | None) -> RunLock:
    """Makes the folder of a new run with config.json, source/ and run.json, or reopens it; returns its lock. Rank 0 only.

    The folder of a new run is removed again if that fails.
    """
    experiment = job.experiment
    commit, dirty = git_state(job.root)
    facts: dict[str, Any] = {
        "layout": layout_line(experiment, job.layout),
        "precision": experiment.precision,
        "steps": experiment.schedule.steps,
        "overrides": [[name, str(old), str(new)] for name, old, new in job.overrides],
        "commit": commit,
        "dirty": dirty,
    }
    folder = resumed.folder if resumed else run_folder.create(job.root / experiment.track.runs, job.name)
    try:
        with holding.disk_errors(folder.path, lambda: resumed is not None):
            lock = holding.take(job, folder)
            if resumed and job.resume:
                damaged = job.resume.passed_over
                checkpoint_folder.set_aside(folder.checkpoints / name for name in damaged)
                segment = {"started": run_folder.now(), "checkpoint": resumed.checkpoint.name, **facts}
                segments.reopen(folder, resumed.step, segment | ({"passed_over": damaged} if damaged else {}))
                serialization.save(experiment, folder.config)
            else:
                serialization.save(experiment, folder.config)
                run_folder.start(folder, source=run_folder.keep_source(folder, job.folder), **facts)
            mark_as_own(folder)
    except Exception:
        if not resumed:
            job.close()
            run_folder.discard(folder)
        raise
    return lock


def open_log(folder: RunFolder, rank: int) -> None:
    """From now on log records and warnings go into this rank's log in the run's folder instead of between the lines of the terminal."""
    log_format = "%(asctime)s %(name)s %(levelname)s %(message)s"
    logging.basicConfig(filename=folder.rank_log(rank), level=logging.INFO, format=log_format)
    logging.raiseExceptions = False  # a full disk costs records, ours and W&B's, but prints no traceback for each on the terminal
    logging.captureWarnings(True)
    warnings.simplefilter("default")


def header(job: Job, folder: RunFolder, console: Console) -> None:
    """Shows the run's title and what was resolved."""
    commit, dirty = git_state(job.root)
    title = f"{job.name} · run {folder.title} · {commit} ({'dirty' if dirty else 'clean'}) · {folder.shown}"
    console.header([("", title), *describe(job, device_name(), software())])
    for warning in job.warnings:
        console.warn(warning, in_header=True)
    if not is_own(folder):
        console.warn("the run's mark could not be written, so verbs that use the run will need --trust (docs/strangers.md)", in_header=True)


def prepare_run(
    job: Job,
    held: Holding,
    grid: Grid,
    console: Console,
    resumed: Start | None,
    watch: Watchdog,
    variants: Mapping[str, Any],
) -> tuple[Run, AnomalyMonitor, Periodic, Checkpointer]:
    """The run before its first step. A signal ends it at once until everything is there; from then on it waits for the end of a step.

    `variants`: what the experiment names of its variant.py.
    """
    experiment, folder = job.experiment, held.folder
    with watch.progress.work("preparing the text"), together(grid):  # a rank may be the only one that finds its text wrong
        show = functools.partial(console.progress, unit="characters")
        corpus = prepare.load(experiment.data, job.root, experiment.model.vocab_size, show)
        text = prepare.held_out(corpus, experiment.schedule.validate_tokens)
        if not resumed:
            prepare.refuse_same_text(experiment.data, corpus)
        show_data(job, corpus, text, console)
        prompts = samples.prompts_of(experiment, corpus)
        tasks = in_training.prepare_tasks(experiment, job.root, corpus.tokenizer, show)
    refuse_data_that_differ(data_claims(corpus, tasks), grid)
    watch.progress.advance("building the engine")
    memory = HostMemory()
    engine = build_engine(job, grid, variants)
    preflight(job, folder, engine, resumed.step if resumed else 0)
    seed_generators(experiment.seed, grid)
    facts: dict[str, Any] | None = None
    with watch.progress.work("reading the checkpoint"):
        if resumed:
            with console.progress("reading the checkpoint", announced=False):
                resumed, facts = load_newest_whole(resumed, job.resume_option == resume.AUTO, held, engine, console)
            refuse_other_data(facts, corpus.fingerprint, resumed.checkpoint)
            console.header([("resume", resume_line(resumed, facts, job, engine, variants))])
        elif path := resume.init_from_path(experiment, job.root):
            console.header([("weights", f"{experiment.init_from} · step {load_initial(path, engine)['step']}")])
    watch.progress.advance("starting the tracker")
    tracker = open_tracker(job, held, engine, console, resumed)
    for store in (corpus.train, corpus.validation):
        tracker.refer_to_store(store.prefix)
    meter = Meter(job.layout.tokens_per_step, memory=memory)
    run = Run(job, held, folder, variants, corpus, engine, tracker, console, meter, watch.note_signals(), watch.progress)
    anomalies, periodic = AnomalyMonitor(experiment, engine, corpus, held, console, tracker), Periodic(run, text, tasks, prompts)
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


def open_tracker(job: Job, held: Holding, engine: Engine, console: Console, resumed: Start | None) -> Tracker:
    """The run's tracker, quiet on ranks > 0, with everything that W&B is told of the run. Rank 0 writes deepspeed.json beside it."""
    description, folder = None, held.folder
    if job.ranks.rank == 0:
        held.check()
        write_json(folder.deepspeed, engine.config)
        description = wandb_client.describe(folder)
    tracker = Tracker(folder, description, job.experiment.track.mode, after=resumed.step if resumed else 0, check=held.check)
    console.header([("tracking", tracker.line)])
    show_notes(tracker, console)
    return tracker


def show_notes(tracker: Tracker, console: Console) -> None:
    """Shows what went wrong with W&B since the last call, each sentence once."""
    while tracker.notes:
        console.warn(tracker.notes.pop(0))


def data_claims(corpus: Corpus, tasks: Sequence[PreparedTask]) -> dict[str, str | None]:
    """Digests of what this rank reads, by the words for it. They are known once the text is prepared, and must be equal on all ranks."""
    return {
        "the text of data.train": corpus.train.facts.get("source_sha256"),
        "the text of data.validation": corpus.validation.facts.get("source_sha256"),
        "the tokenizer of data.tokenizer": corpus.tokenizer.fingerprint,
        "the prepared data": corpus.fingerprint,
        **{f"the data of task {task.task.name!r}": task.digest or None for task in tasks},
    }


def refuse_data_that_differ(own: dict[str, str | None], grid: Grid) -> None:
    """Every rank raises a SharedMistake if the data of one, `own` by name, differ from rank 0's. Collective."""
    everyone = all_gather_objects(Claims(grid.rank, socket.gethostname(), named={"data": own}), grid)
    if text := agreement.disagreement(everyone):
        raise SharedMistake(text, reports=grid.rank == 0)


def preflight(job: Job, folder: RunFolder, engine: Engine, step: int) -> None:
    """Refuses a run that could not keep what it learns from `step` on. Every rank raises the same SharedMistake."""
    own = sum(math.prod(slice_of(parameter).shape) for name, parameter in engine.parameters.items() if engine.owns(name))
    whole_model = sum(dict(all_gather_objects((engine.grid.pipe_rank, own), engine.grid)).values())  # a tied table counts once
    trouble = disk_trouble(job, folder, whole_model * STATE_BYTES, step) if engine.grid.rank == 0 else None
    if trouble := all_gather_objects(trouble, engine.grid)[0]:
        reason, code = trouble
        raise SharedMistake(reason, reports=engine.grid.rank == 0, code=code)


def disk_trouble(job: Job, folder: RunFolder, size: int, step: int) -> tuple[str, int] | None:
    """Why the run's folder cannot take the checkpoints, of `size` bytes each, that the run keeps from `step` on, and the exit code."""
    probe = folder.checkpoints / f".{uuid.uuid4().hex}.probe"
    try:
        probe.write_bytes(b"?")
        probe.unlink()
    except OSError as error:
        reason = f"{folder.checkpoints} cannot be written ({error.strerror})"
        if error.errno in FULL:
            return f"{reason} → make room, or set track.runs to another disk", DISK
        return f"{reason} → set track.runs to a folder you may write", WRONG
    keep, schedule = job.experiment.checkpoints, job.experiment.schedule
    planned = room.planned_saves(step, schedule.steps, keep.every)
    need = room.bytes_needed(room.sizes(folder.checkpoints), planned, size, keep)
    free = free_bytes(folder.checkpoints)
    if free is not None and free < need:
        have = f"the disk of {folder.checkpoints} has {megabytes(free)} free"
        needs = f"a checkpoint needs {megabytes(size)}" + (f", and {room.describe(need, size, keep)}" if need > size else "")
        fewer = ", keep fewer" if need > size else ""
        return f"{needs}; {have} → make room{fewer}, or set track.runs to another disk", DISK
    return None
