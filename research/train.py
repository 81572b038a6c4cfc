"""The one training loop."""

import sys
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from parallel import checkpoint
from parallel.engine import Engine
from parallel.grid import Grid
from parallel.suspects import Suspects
from research import between, exams, finish, initial, look, run_folder, samples, saving, state
from research.data.batches import train_micro_batches
from research.data.prepare import Corpus
from research.exams import Sat
from research.job import Job
from research.meter import Meter
from research.parents import Parents
from research.preflight import preflight
from research.progress import Progress, Stage
from research.report import Report, Silent
from research.run_folder import FAILED, FINISHED, INTERRUPTED, RunFolder
from research.schedule import learning_rate
from research.spikes import Spikes
from research.start import Resumed, Voice, agreed_resume, corpus_of, engine_of, header, open_folder, say, seeded, tell, tracker_of
from research.stopping import SIGNALLED, Stop, leave_when_asked
from research.tensors import micro_batch
from research.tracking import NoTracker, Tracker
from research.watch import Watch, watched
from research.world import joined

WATCHED = 3
"""Exit code of a run that stopped itself: a loss or gradient that is not finite, too many skipped steps, a spike."""


@dataclass
class Run:
    """One run on one rank while it is under way."""

    job: Job
    folder: RunFolder
    corpus: Corpus
    engine: Engine
    tracker: Tracker | NoTracker
    voice: Voice
    meter: Meter
    stop: Stop
    doing: Progress
    saver: checkpoint.Saver
    spikes: Spikes
    suspects: Suspects
    exams: list[Sat]
    """What is asked every evaluate.every steps."""
    prompts: tuple[str, ...]
    """What is continued every sample.every steps."""
    step: int = 0
    """Optimizer steps attempted so far."""
    saved_step: int = -1
    """Of the newest checkpoint begun or gone on from; −1: none."""
    best: tuple[float, int] | None = None
    """Lowest bits per byte so far and its step."""
    skips_in_a_row: int = 0
    failure: str | None = None
    """Why the run stops itself after this step, as a sentence."""
    due: list[str] = field(default_factory=list)
    """What is to be done before the next step (research/between.py); not empty after a step: a signal has cut it short."""

    @property
    def cut_short(self) -> bool:
        """Whether a signal came between two steps, before all that was due there was done."""
        return bool(self.due)

    def progress(self) -> dict[str, float]:
        """The axes of a row."""
        return {
            "progress/step": self.step,
            "progress/tokens": self.step * self.job.layout.tokens_per_step,
            "progress/samples": self.step * self.job.experiment.schedule.batch_size,
            "progress/applied_steps": self.step - self.engine.skipped_steps,
            "progress/seconds": self.meter.seconds(),
        }


def train(job: Job, parents: Parents) -> None:
    """Trains the experiment of `job` to its last step, or to a signal, from its first step or a checkpoint; ends with one. Collective."""
    voice = Report() if job.ranks.rank == 0 else Silent()
    with watched(job, parents) as watch, joined(job) as grid:
        resumed = agreed_resume(job)
        folder = open_folder(job, resumed)
        status, failure = FAILED, ""
        try:
            leave_when_asked()
            with watch.together(folder):
                header(job, folder, voice)
                run = prepared(job, folder, grid, voice, resumed, watch)
                status = carried_out(run)
                failure = run.failure or ""
        except SystemExit:  # a signal came before the first step
            status = INTERRUPTED
            raise
        finally:
            if grid.rank == 0:
                run_folder.end(folder, status, failure or watch.reason)
        finish.last_words(run)
        dist.barrier()  # the first rank to leave with an exit code makes a launcher end the others
    if run.failure:
        leave_with(run.failure, grid)
    if status == INTERRUPTED:
        raise SystemExit(SIGNALLED + run.stop.signal)


def leave_with(failure: str, grid: Grid) -> None:
    """Rank 0 says why, every rank leaves."""
    if grid.rank == 0:
        sys.stderr.write(f"error  {failure}\n")
    raise SystemExit(WATCHED)


def prepared(job: Job, folder: RunFolder, grid: Grid, voice: Voice, resumed: Resumed | None, watch: Watch) -> Run:
    """The run before its first step. A signal leaves at once until all is there, then waits for the step's end."""
    with watch.progress.work("preparing the text"):
        corpus = corpus_of(job, voice)
        prompts = samples.prompts_of(job.experiment, corpus)
        sittings = exams.read(job.experiment, job.root, corpus.tokenizer, lambda what: say(voice, what))
    watch.progress.advance("building the engine")
    engine = engine_of(job, grid)
    preflight(job, folder, corpus, engine, sittings)
    seeded(job.experiment.seed, grid)
    with watch.progress.work("reading the checkpoint"):
        told = state_of(resumed, engine, corpus, voice) if resumed else None
        if resumed is None:
            begin(job, engine, voice)
    watch.progress.advance("starting the tracker")
    run = Run(
        job=job,
        folder=folder,
        corpus=corpus,
        engine=engine,
        tracker=tracker_of(job, folder, engine, voice, resumed),
        voice=voice,
        meter=Meter(job.layout.tokens_per_step),
        stop=watch.note_signals(),
        doing=watch.progress,
        saver=saving.saver_of(job.experiment),
        spikes=Spikes(job.experiment.watch.spike),
        suspects=Suspects(engine.parameters, engine.device),
        exams=sittings,
        prompts=prompts,
    )
    if told:
        state.restore(run, told)
        run.saved_step = run.step
    return run


def begin(job: Job, engine: Engine, voice: Voice) -> None:
    """The weights of `init_from` in the engine of a run that begins with them."""
    if path := initial.path_of(job.experiment, job.root):
        facts = checkpoint.load_initial(path, engine)
        voice.header([("weights", f"{job.experiment.init_from} · step {facts['step']}")])


def state_of(resumed: Resumed, engine: Engine, corpus: Corpus, voice: Voice) -> dict[str, Any]:
    """The checkpoint's state in the engine, and its facts."""
    told = checkpoint.load(resumed.checkpoint, engine)
    state.refuse_other_data(told, corpus.fingerprint, str(resumed.checkpoint))
    voice.header([("resume", resumed.line(told["step"], checkpoint.differences(told, engine)))])
    return told


def carried_out(run: Run) -> str:
    """All of the run's steps, or those before a signal, and its checkpoint; returns its status. The tracker is closed whatever happens."""
    status = FAILED
    try:
        steps_of(run)
        with run.doing.work("saving", Stage.SAVING):
            finish.finish(run)
        if not run.failure:
            whole = run.step >= run.job.experiment.schedule.steps and not run.cut_short
            status = FINISHED if whole else INTERRUPTED
    finally:
        run.doing.advance("closing the tracker", Stage.LEAVING)
        run.tracker.finish(status)
        tell(run.tracker, run.voice)
    return status


def steps_of(run: Run) -> None:
    """Steps, and between them rows, validations, tasks, samples, checkpoints and a look at whether to stop."""
    schedule, checkpoints = run.job.experiment.schedule, run.job.experiment.checkpoints
    run.voice.columns()
    run.meter.start()
    between.carry_out(run, run.due)  # what the signal that ended the segment before this one has left
    while run.step < schedule.steps and not run.failure and not run.cut_short and not run.stop.agreed():
        run.doing.stepping(run.step + 1)
        one_step(run)
        last = run.step == schedule.steps
        if run.step % schedule.log_every == 0 or last or run.step == 1 or run.failure:
            report_interval(run)
        if run.failure:
            return
        between.carry_out(run, between.due(run))
        if not last and checkpoints.every and run.step % checkpoints.every == 0:
            with run.doing.work("saving", Stage.SAVING):
                saving.save(run)
        saving.poll(run)


def one_step(run: Run) -> None:
    """One optimizer step on the step's own samples at the step's own learning rate."""
    experiment, grid = run.job.experiment, run.engine.grid
    schedule = experiment.schedule
    batches = train_micro_batches(
        run.corpus.train,
        experiment.model.seq_length,
        schedule.batch_size,
        schedule.micro_batch_size,
        grid.data_rank,
        grid.data,
        experiment.seed,
        run.step,
    )
    lr = learning_rate(run.step, experiment.optimizer, schedule.steps)
    run.suspects.clear()
    skipped = run.engine.skipped_steps
    loss = run.engine.train_batch((micro_batch(batch, experiment.model.drops) for batch in batches), lr)
    run.step += 1
    run.meter.step(loss, lr)
    look.at_step(run, loss, run.engine.skipped_steps > skipped)


def report_interval(run: Run) -> None:
    """The row of the steps since the last one: metrics.jsonl, W&B and the terminal."""
    experiment = run.job.experiment
    row = run.meter.interval(run.engine.gradient_norm()) | run.progress()
    run.tracker.log(row)
    pauses = between.intervals(experiment) | {"saving": experiment.checkpoints.every}
    run.voice.train(row, run.meter.seconds_left(run.step, experiment.schedule.steps, pauses))
