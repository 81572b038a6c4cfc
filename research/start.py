"""What a run needs before its first step: a folder, text, an engine, a tracker. Every function is collective."""

import logging
import os
import warnings

from models import gpt
from parallel.distributed import device
from parallel.engine import Engine, make_engine
from parallel.grid import Grid
from research import config, describe, run_folder, text
from research.about import About
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


def open_folder(job: Job) -> RunFolder:
    """The run's folder, made by rank 0 and known to all; its config.json, source/ and run.json; this rank's log."""
    runs = job.root / job.experiment.track.runs
    first = job.ranks.rank == 0
    folder = RunFolder(type(runs)(agreed(str(run_folder.create(runs, job.name).path) if first else "")))
    if first:
        config.save(job.experiment, folder.config)
        sums = run_folder.keep_source(folder, job.folder)
        overrides = [[name, str(old), str(new)] for name, old, new in job.overrides]
        run_folder.start(
            folder,
            layout=layout_tag(job),
            precision=job.experiment.precision,
            steps=job.experiment.schedule.steps,
            overrides=overrides,
            source=sums,
        )
    _log_to(folder, job.ranks.rank)
    return folder


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
    corpus = prepare.load(experiment.data, job.root, experiment.model.vocab_size, lambda what: _say(voice, what))
    schedule, length = experiment.schedule, experiment.model.seq_length
    seen = epochs(corpus.train, length, schedule.steps * schedule.batch_size)
    sizes = f"{text.count(corpus.train.num_tokens)} train, {text.count(corpus.validation.num_tokens)} validation tokens"
    voice.header([("data", f"{experiment.data.train} · {corpus.tokenizer.name} · {sizes} · {schedule.steps} steps = {seen:.2f} epochs")])
    return corpus


def _say(voice: Voice, what: str) -> None:
    with voice.progress(what):
        pass


def engine_of(job: Job, grid: Grid) -> Engine:
    """The model on its DeepSpeed engine."""
    experiment = job.experiment
    model = experiment.model
    layers = gpt.layers(model, grid, experiment.seed, load_variants(job.folder, model), experiment.parallel.recompute)
    loss = gpt.TokenLoss(model.vocab_size, experiment.optimizer.label_smoothing, grid.tensor_group)
    return make_engine(layers, loss, grid, engine_settings(experiment, job.layout))


def tracker_of(job: Job, folder: RunFolder, engine: Engine, voice: Voice) -> Tracker | NoTracker:
    """Rank 0's tracker, with all that W&B is told of the run; deepspeed.json beside it."""
    if job.ranks.rank > 0:
        return NoTracker()
    run_folder.write_json(folder.deepspeed, engine.config)
    commit, dirty = git_state(job.root)
    tags = [layout_tag(job), job.experiment.precision]
    about = About(config.resolved(job.experiment), engine.config, commit, dirty, family=job.name, tags=tags)
    tracker = Tracker(folder, job.experiment.track, about)
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
