"""The one training loop."""

import shlex
import time
from dataclasses import dataclass

import torch.distributed as dist

from parallel import checkpoint
from parallel.engine import Engine
from parallel.grid import Grid
from research import describe, evaluate, plot, run_folder, sample, text
from research.data.batches import train_micro_batches
from research.data.prepare import Corpus
from research.job import Job
from research.meter import Meter
from research.report import Report, Silent
from research.run_folder import FAILED, FINISHED, INTERRUPTED, RunFolder
from research.schedule import learning_rate
from research.start import Voice, corpus_of, engine_of, header, open_folder, short, tell, tracker_of
from research.stopping import SIGNALLED, Stop, leave_when_asked
from research.tensors import micro_batch
from research.tracking import NoTracker, Tracker
from research.world import joined

PROMPT_TOKENS = 8
"""The sample at the end continues so many tokens of the held-out text."""


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
    step: int = 0
    """Optimizer steps attempted so far."""
    best: tuple[float, int] | None = None
    """Lowest bits per byte so far and its step."""


def train(job: Job) -> None:
    """Trains the experiment of `job` from its first step to its last, or to a signal; ends with a checkpoint. Collective."""
    voice = Report() if job.ranks.rank == 0 else Silent()
    with joined(job) as grid:
        folder = open_folder(job)
        status = FAILED
        try:
            leave_when_asked()
            header(job, folder, voice)
            run = prepared(job, folder, grid, voice)
            status = carried_out(run)
        except SystemExit:  # a signal came before the first step
            status = INTERRUPTED
            raise
        finally:
            if grid.rank == 0:
                run_folder.end(folder, status)
        last_words(run)
        dist.barrier()  # the first rank to leave with an exit code makes a launcher end the others
    if status == INTERRUPTED:
        raise SystemExit(SIGNALLED + run.stop.signal)


def prepared(job: Job, folder: RunFolder, grid: Grid, voice: Voice) -> Run:
    """The run before its first step. A signal leaves at once until all is there, then waits for the step's end."""
    corpus = corpus_of(job, voice)
    engine = engine_of(job, grid)
    tracker = tracker_of(job, folder, engine, voice)
    return Run(job, folder, corpus, engine, tracker, voice, Meter(job.layout.tokens_per_step), Stop())


def carried_out(run: Run) -> str:
    """All of the run's steps, or those before a signal, and its checkpoint; returns its status. The tracker is closed whatever happens."""
    status = FAILED
    try:
        steps_of(run)
        finish(run)
        status = FINISHED if run.step == run.job.experiment.schedule.steps else INTERRUPTED
    finally:
        run.tracker.finish(status)
        tell(run.tracker, run.voice)
    return status


def steps_of(run: Run) -> None:
    """Steps, and between them rows, validations and a look at whether to stop."""
    schedule = run.job.experiment.schedule
    run.voice.columns()
    run.meter.start()
    while run.step < schedule.steps and not run.stop.agreed():
        one_step(run)
        last = run.step == schedule.steps
        if run.step % schedule.log_every == 0 or last or run.step == 1:
            report_interval(run)
        if last or (schedule.validate_every and run.step % schedule.validate_every == 0):
            validate(run)


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
    loss = run.engine.train_batch((micro_batch(batch, experiment.model.drops) for batch in batches), lr)
    run.step += 1
    run.meter.step(loss, lr)


def report_interval(run: Run) -> None:
    """The row of the steps since the last one: metrics.jsonl, W&B and the terminal."""
    row = run.meter.interval(run.engine.gradient_norm()) | progress(run)
    run.tracker.log(row)
    run.voice.train(row, run.meter.seconds_left(run.step, run.job.experiment.schedule))


def validate(run: Run) -> None:
    """All of the held-out text; its time is not counted as training time."""
    with run.meter.paused():
        model = run.job.experiment.model
        found = evaluate.evaluate(run.engine, run.corpus.validation, model.seq_length, model.drops)
    is_best = run.best is None or found.bits_per_byte < run.best[0]
    if is_best:
        run.best = (found.bits_per_byte, run.step)
    row = found.row() | progress(run)
    run.tracker.log(row)
    run.voice.validation(row, is_best)


def progress(run: Run) -> dict[str, float]:
    """The axes of a row."""
    tokens = run.step * run.job.layout.tokens_per_step
    return {
        "progress/step": run.step,
        "progress/tokens": tokens,
        "progress/samples": run.step * run.job.experiment.schedule.batch_size,
        "progress/applied_steps": run.step - run.engine.skipped_steps,
        "progress/seconds": run.meter.seconds(),
    }


def finish(run: Run) -> None:
    """The last checkpoint and the loss curve."""
    started = time.monotonic()
    target = run.folder.checkpoints / f"step_{run.step:06d}"
    checkpoint.Saver().save(target, run.engine, facts(run))
    if run.engine.grid.rank > 0:
        return
    took = time.monotonic() - started
    run.voice.header([("saved", f"{short(run.folder)}/checkpoints/{target.name} ({took:.1f} s)")])
    plot.loss_curve(run.folder.metrics, run.folder.loss_png, run.folder.title, describe.layout_line(run.job))
    schedule = run.job.experiment.schedule
    run.voice.done(run.step, schedule.steps, run.meter.seconds(), run.best, run.engine.skipped_steps, run.folder.loss_png.name)
    show_sample(run)


def show_sample(run: Run) -> None:
    """What the model writes after the held-out text's first words. Rank 0 reads its own checkpoint, so that no other is needed."""
    words, axes = run.corpus.tokenizer, progress(run)
    prompt = first_words(run)
    written = sample.write_after_training(run.folder, run.job.experiment, words, prompt)
    if written is None:
        run.voice.warn("no sample: the whole model is large for this machine's free memory → `python -m research sample` on another")
        return
    run.voice.sample(prompt, written)
    run.tracker.sample(int(axes["progress/step"]), int(axes["progress/tokens"]), prompt, written)


def first_words(run: Run) -> str:
    """The prompt: how the held-out text begins, on one line, so that it can be typed."""
    return text.one_line(run.corpus.tokenizer.decode(run.corpus.validation.tokens[:PROMPT_TOKENS].tolist()))


def facts(run: Run) -> dict[str, object]:
    """What a checkpoint's manifest says of the run."""
    layout = run.job.layout
    return {
        "step": run.step,
        "samples": run.step * run.job.experiment.schedule.batch_size,
        "tokens": run.step * layout.tokens_per_step,
        "applied_steps": run.step - run.engine.skipped_steps,
        "data": run.corpus.fingerprint,
    }


def last_words(run: Run) -> None:
    """What to type next."""
    here, prompt = short(run.folder), shlex.quote(first_words(run))
    dashboard = [f"wandb leet {here}/wandb"] if run.folder.wandb.is_dir() else []
    run.voice.next([f"python -m research sample {here} --prompt {prompt}", *dashboard, "python -m research runs"])
