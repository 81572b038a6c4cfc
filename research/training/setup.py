"""Set-up of a training run before its first step: `open_folder` makes or reopens the run's folder, `prepare_run` makes everything else.

Before, between and after, the ranks make the checks of research/training/preflight.py. Every function is collective.
"""

import functools
import json
import logging
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import architectures
from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.load import load_initial
from parallel.distributed import device_name
from parallel.engines import process_state
from parallel.engines.engine import Engine, make_engine
from parallel.files import write_json
from parallel.grid import Grid
from parallel.object_collectives import all_gather_objects, broadcast_object, together
from research.cluster.environment import git_state
from research.cluster.memory import HostMemory
from research.cluster.software import digest_of
from research.cluster.world import software
from research.config import serialization
from research.config.diff import describe_changes
from research.config.examples import describe_examples
from research.config.layout import engine_settings
from research.config.plausibility import doubts_of_text
from research.config.sources import TRAIN, describe_texts
from research.data import prepare
from research.data.batches import Sampler
from research.data.examples import ExampleSampler
from research.data.held_out import HeldOutSamples
from research.data.prepare import Corpus, HeldOut
from research.evaluation import in_training
from research.reliability.watchdog import Watchdog
from research.tracking import format as fmt
from research.tracking import run_folder, segments, wandb_client
from research.tracking.console import Console
from research.tracking.own_runs import is_own, mark_as_own
from research.tracking.run_folder import RunFolder
from research.tracking.run_lock import RunLock
from research.tracking.tracker import Tracker
from research.training import components, locked_run, preflight, resume, samples
from research.training.anomalies import AnomalyMonitor
from research.training.checkpointer import Checkpointer, refuse_other_data
from research.training.continuation import continuation
from research.training.fallback import Start, load_newest_whole
from research.training.init_from import init_from_path
from research.training.job import Job, describe, layout_line
from research.training.locked_run import LockedRun
from research.training.meter import Meter
from research.training.periodic import Periodic, shared_texts
from research.training.sampler import context_of, held_out_of, sampler_of
from research.training.state import Run

MOST_EPOCHS = 4
"""Passes through a source from which on its repetition gives a warning: up to four are nearly as good as new text (arXiv:2305.16264)."""


def resume_line(start: Start, facts: dict[str, Any], job: Job, engine: Engine, variants: Mapping[str, Any]) -> str:
    """'step 120 of gpt_sotu-7f3a2c, step_000120 · bit for bit as if it had never stopped', or what else it is, and the changes."""
    layout_and_machine = process_state.differences(facts, engine)
    same_code = facts["code"] == digest_of(job.library) if "code" in facts else None
    kind = engine.device.type
    how = continuation(facts["step"], start.changes, job.experiment, layout_and_machine, same_code, kind, variants)
    words = [f"step {facts['step']} of {start.folder.title}, {start.checkpoint.name}", how]
    return " · ".join([*words, *([describe_changes(start.changes)] if start.changes else [])])


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


def open_folder(job: Job, grid: Grid, resumed: Start | None) -> LockedRun:
    """The run's folder and its lock, created or reopened by rank 0, and this rank's log. Collective.

    If it fails on one rank, every rank raises a SharedMistake, and the folder of a new run is removed.
    """
    lock = None
    with together(grid):
        if job.ranks.rank == 0:
            lock = begin_folder(job, resumed)
    locked = locked_run.share(lock, job.experiment)
    try:
        with together(grid), locked_run.disk_errors(locked.folder.path, lambda: resumed is not None):
            open_log(locked.folder, job.ranks.rank)
    except Exception:
        if not resumed:
            locked.discard()
        raise
    return locked


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
        with locked_run.disk_errors(folder.path, lambda: resumed is not None):
            lock = locked_run.take(job, folder)
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
    locked: LockedRun,
    grid: Grid,
    console: Console,
    resumed: Start | None,
    watch: Watchdog,
    variants: Mapping[str, Any],
) -> tuple[Run, AnomalyMonitor, Periodic, Checkpointer]:
    """The run before its first step. A signal ends it at once until everything is there; from then on it waits for the end of a step.

    `variants`: what the experiment names of its variant.py.
    """
    experiment, folder = job.experiment, locked.folder
    # with --rehash, what one rank of a node reads from this moment on is read for all of them
    believe_since_ns = all_gather_objects(time.time_ns(), grid)[0] if job.rehash else 0
    with watch.progress.work("preparing the text"), together(grid):  # a rank may be the only one that finds its text wrong
        show = functools.partial(console.progress, unit="characters")
        corpus = prepare.load(experiment.data, job.root, experiment.model.vocab_size, show, believe_since_ns)
        prepare.refuse_short_parts(experiment.data, corpus, experiment.model.seq_length)
        sampler, texts = sampler_of(experiment, corpus, variants), held_out_of(experiment, corpus, variants)
        if not resumed:
            prepare.refuse_same_text(experiment.data, corpus)
        show_data(job, corpus, sampler, texts, console)
        prompts = samples.prompts_of(experiment, corpus)
        tasks = in_training.prepare_tasks(experiment, job.root, corpus.tokenizer, show)
    preflight.refuse_data_that_differ(preflight.data_claims(corpus, tasks), grid)
    watch.progress.advance("building the engine")
    memory = HostMemory()
    engine = build_engine(job, grid, variants)
    preflight.check_disk(job, folder, engine, resumed.step if resumed else 0)
    seed_generators(experiment.seed, grid)
    facts: dict[str, Any] | None = None
    with watch.progress.work("reading the checkpoint"):
        if resumed:
            with console.progress("reading the checkpoint", announced=False):
                resumed, facts = load_newest_whole(resumed, job.resume_option == resume.AUTO, locked, engine, console)
            train = next((then for name, then, _ in resumed.changes if name == TRAIN), None)
            sources = list(corpus.sources) if train is None else [name for name in corpus.sources if name in {one["name"] for one in train}]
            refuse_other_data(facts, corpus.fingerprint_of(sources), resumed.checkpoint)
            console.header([("resume", resume_line(resumed, facts, job, engine, variants))])
        elif path := init_from_path(experiment, job.root):
            console.header([("weights", f"{experiment.init_from} · step {load_initial(path, engine)['step']}")])
    watch.progress.advance("starting the tracker")
    tracker = open_tracker(job, locked, engine, console, resumed)
    stores = {store.prefix: store.facts for store in (*corpus.held_out.values(), *corpus.sources.values())}  # parts of one store once
    for prefix, store_facts in reversed(stores.items()):
        tracker.refer_to_store(prefix, store_facts)
    meter = Meter(memory=memory)
    run = Run(job, locked, folder, variants, corpus, sampler, engine, tracker, console, meter, watch.note_signals(), watch.progress)
    anomalies, periodic = AnomalyMonitor(experiment, engine, sampler, locked, console, tracker), Periodic(run, texts, tasks, prompts)
    checkpointer = Checkpointer(run, anomalies, periodic)
    if facts:
        checkpointer.restore(facts)
    return run, anomalies, periodic, checkpointer


def show_data(job: Job, corpus: Corpus, sampler: Sampler, texts: Sequence[HeldOut | HeldOutSamples], console: Console) -> None:
    """Shows the texts, the tokenizer and their sizes, and warns of what does not fit together and only the texts can tell."""
    data, schedule = job.experiment.data, job.experiment.schedule
    seen = sampler.epochs(job.layout.batch_sizes.before(schedule.steps))
    shared = shared_texts(texts)
    predicted, stores = sum(text.tokens for text in shared), [corpus.held_out[text.source] for text in shared]
    there = sum(store.num_tokens for store in stores)
    trained = sum(store.num_tokens for store in corpus.sources.values())
    sizes = f"{fmt.count(trained)} train, {fmt.count(there)} validation tokens"
    if predicted < there - len(shared):
        sizes += f" (of which the first {fmt.count(predicted)} are predicted)"
    if "first_token" in corpus.validation.facts:
        sizes += " (one document, split by position)"
    epochs = f" = {seen[0]:.2f} epochs" if len(seen) == 1 else ""
    lines = [("data", f"{describe_texts(data.train)} · {corpus.tokenizer.name} · {sizes} · {schedule.steps} steps{epochs}")]
    if len(seen) > 1:
        for (name, store), passes in zip(corpus.sources.items(), seen.tolist(), strict=True):
            where = store.facts.get("source", store.prefix)
            lines.append(("source", f"{name} · {fmt.count(store.num_tokens)} tokens · {passes:.2f} epochs · {where}"))
    if isinstance(sampler, ExampleSampler):
        lines += [("samples", summary) for summary in sampler.summaries or [describe_examples(data.examples)]]
    console.header(lines)
    predicted_each_time = sum(text.tokens for text in texts)
    warnings = [*doubts_of_text(job.experiment, corpus.tokenizer.vocab_size, predicted_each_time), *doubts_of_epochs(corpus, seen)]
    for warning in warnings:
        console.warn(warning, in_header=True)


def doubts_of_epochs(corpus: Corpus, seen: np.ndarray) -> Iterator[str]:
    """One warning for each of several sources that the run reads many times. 'sources': its passes through each."""
    for (name, store), passes in zip(corpus.sources.items(), seen.tolist(), strict=True):
        if len(seen) > 1 and passes > MOST_EPOCHS:
            yield (
                f"the source {name!r} of {store.num_tokens:,} tokens is read {passes:.1f} times, more than {MOST_EPOCHS}: repeated text "
                "teaches less each time (arXiv:2305.16264) → give it a smaller weight, or more text"
            )


def build_engine(job: Job, grid: Grid, variants: Mapping[str, Any]) -> Engine:
    """The model on its DeepSpeed engine. `variants`: what the experiment names of its variant.py."""
    experiment, model = job.experiment, job.experiment.model
    layers = architectures.layers(model, grid, experiment.seed, variants, experiment.parallel.recompute, context_of(experiment, variants))
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


def open_tracker(job: Job, locked: LockedRun, engine: Engine, console: Console, resumed: Start | None) -> Tracker:
    """The run's tracker, quiet on ranks > 0, with everything that W&B is told of the run. Rank 0 writes deepspeed.json beside it."""
    description, folder = None, locked.folder
    if job.ranks.rank == 0:
        locked.check()
        write_json(folder.deepspeed, engine.config)
        description = wandb_client.describe(folder)
    tracker = Tracker(folder, description, job.experiment.track.mode, after=resumed.step if resumed else 0, check=locked.check)
    console.header([("tracking", tracker.line)])
    show_notes(tracker, console)
    return tracker


def show_notes(tracker: Tracker, console: Console) -> None:
    """Shows what went wrong with W&B since the last call, each sentence once."""
    while tracker.notes:
        console.warn(tracker.notes.pop(0))
