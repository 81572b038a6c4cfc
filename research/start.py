"""What a run needs before its first step: a folder, text, an engine, a tracker. Every function is collective."""

import json
import logging
import os
import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import gpt
from parallel.distributed import device
from parallel.engine import Engine, make_engine
from parallel.grid import Grid
from research import config, describe, run_folder, segments, text
from research.about import About
from research.changes import said
from research.data import prepare
from research.data.batches import epochs
from research.data.prepare import Corpus
from research.experiment import load_variants
from research.job import Job
from research.layout import engine_settings
from research.machine import git_state
from research.report import Report, Silent
from research.run_folder import RunFolder
from research.tracking import NoTracker, Tracker
from research.world import agreed, software

Voice = Report | Silent


@dataclass(frozen=True)
class Resumed:
    """A run that goes on, as every rank knows it."""

    folder: RunFolder
    checkpoint: Path
    step: int
    changed: str
    """Settings that are others now, as a person reads them."""

    def line(self, step: int, differences: dict[str, tuple[Any, Any]]) -> str:
        """'step_000120 of gpt_sotu-7f3a2c · bit for bit as if it had never stopped', or why only within rounding."""
        why = ", ".join(f"{name.partition('.')[2]} {then} → {now}" for name, (then, now) in differences.items())
        exact = f"within rounding ({why})" if why else "bit for bit as if it had never stopped"
        words = [f"step {step} of {self.folder.title}, {self.checkpoint.name}", exact, *([self.changed] if self.changed else [])]
        return " · ".join(words)


def agreed_resume(job: Job) -> Resumed | None:
    """What rank 0 decided before torch was imported, on every rank. Collective."""
    found = job.resume
    told = json.loads(
        agreed(json.dumps([str(found.folder.path), str(found.checkpoint), found.step, said(found.changed)] if found else None))
    )
    return Resumed(RunFolder(Path(told[0])), Path(told[1]), told[2], told[3]) if told else None


def open_folder(job: Job, resumed: Resumed | None) -> RunFolder:
    """The run's folder, made or opened again by rank 0 and known to all; its config.json, source/ and run.json; this rank's log."""
    if resumed:
        folder = resumed.folder
        if job.ranks.rank == 0:
            segments.reopen(folder, resumed.step, {"started": run_folder.now(), "checkpoint": resumed.checkpoint.name, **facts_of(job)})
            config.save(job.experiment, folder.config)
    else:
        runs = job.root / job.experiment.track.runs
        folder = RunFolder(type(runs)(agreed(str(run_folder.create(runs, job.name).path) if job.ranks.rank == 0 else "")))
        if job.ranks.rank == 0:
            config.save(job.experiment, folder.config)
            run_folder.start(folder, source=run_folder.keep_source(folder, job.folder), **facts_of(job))
    _log_to(folder, job.ranks.rank)
    return folder


def facts_of(job: Job) -> dict[str, Any]:
    """What run.json says of how the run is trained."""
    overrides = [[name, str(old), str(new)] for name, old, new in job.overrides]
    experiment, (commit, dirty) = job.experiment, git_state(job.root)
    return {
        "layout": layout_tag(job),
        "precision": experiment.precision,
        "steps": experiment.schedule.steps,
        "overrides": overrides,
        "commit": commit,
        "dirty": dirty,
    }


def seeded(number: int, grid: Grid) -> None:
    """Seeds Python's, numpy's and torch's generators, for a variant that draws from them; Tessera itself does not while it trains.

    Ranks of one tensor group alike: outside of sliced regions they compute the same.
    """
    own = number * 1_000_003 + grid.pipe_rank * grid.data + grid.data_rank
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)


def _log_to(folder: RunFolder, rank: int) -> None:
    """Log records and warnings of this rank go into the run folder instead of between the lines of the terminal."""
    logging.basicConfig(filename=folder.rank_log(rank), level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.captureWarnings(True)
    warnings.simplefilter("default")


def layout_tag(job: Job) -> str:
    """'pp1·dp1·tp2·zero1': the layout in one word."""
    layout = job.layout
    return f"pp{layout.pipe}·dp{layout.data}·tp{layout.tensor}·zero{layout.zero_stage}"


def header(job: Job, folder: RunFolder, voice: Voice) -> None:
    """The run's title and what was resolved."""
    commit, dirty = git_state(job.root)
    title = f"{job.name} · run {folder.title} · {commit} ({'dirty' if dirty else 'clean'}) · {short(folder)}"
    voice.header([("", title), *describe.describe(job, device().type, software())])


def corpus_of(job: Job, voice: Voice) -> Corpus:
    """The tokenizer and both token stores, prepared by whichever rank of a node comes first."""
    experiment = job.experiment
    corpus = prepare.load(experiment.data, job.root, experiment.model.vocab_size, lambda what: say(voice, what))
    schedule, length = experiment.schedule, experiment.model.seq_length
    seen = epochs(corpus.train, length, schedule.steps * schedule.batch_size)
    sizes = f"{text.count(corpus.train.num_tokens)} train, {text.count(corpus.validation.num_tokens)} validation tokens"
    voice.header([("data", f"{experiment.data.train} · {corpus.tokenizer.name} · {sizes} · {schedule.steps} steps = {seen:.2f} epochs")])
    return corpus


def say(voice: Voice, what: str) -> None:
    """That something slow begins."""
    with voice.progress(what):
        pass


def engine_of(job: Job, grid: Grid) -> Engine:
    """The model on its DeepSpeed engine."""
    experiment = job.experiment
    model = experiment.model
    layers = gpt.layers(model, grid, experiment.seed, load_variants(job.folder, model), experiment.parallel.recompute)
    loss = gpt.TokenLoss(model.vocab_size, experiment.optimizer.label_smoothing, grid.tensor_group)
    return make_engine(layers, loss, grid, engine_settings(experiment, job.layout))


def tracker_of(job: Job, folder: RunFolder, engine: Engine, voice: Voice, resumed: Resumed | None) -> Tracker | NoTracker:
    """Rank 0's tracker, with all that W&B is told of the run; deepspeed.json beside it."""
    if job.ranks.rank > 0:
        return NoTracker()
    run_folder.write_json(folder.deepspeed, engine.config)
    commit, dirty = git_state(job.root)
    tags = [layout_tag(job), job.experiment.precision]
    about = About(config.resolved(job.experiment), engine.config, commit, dirty, family=job.name, tags=tags)
    tracker = Tracker(folder, job.experiment.track, about, after=resumed.step if resumed else 0)
    voice.header([("tracking", tracker.line)])
    tell(tracker, voice)
    return tracker


def tell(tracker: Tracker | NoTracker, voice: Voice) -> None:
    """What went wrong with W&B since the last time, each sentence once."""
    while tracker.notes:
        voice.warn(tracker.notes.pop(0))


def short(folder: RunFolder) -> str:
    """The folder as one would type it here."""
    path = os.path.relpath(folder.path)
    return str(folder.path) if path.startswith("..") else path
