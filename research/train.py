"""The one training loop."""

import shlex
import time
from dataclasses import dataclass

from parallel import checkpoint
from parallel.engine import Engine
from research import describe, evaluate, plot, run_folder, sample
from research.data.batches import train_micro_batches
from research.data.prepare import Corpus
from research.job import Job
from research.meter import Meter
from research.report import Report, Silent
from research.run_folder import FAILED, FINISHED, INTERRUPTED, RunFolder
from research.schedule import learning_rate
from research.start import Voice, corpus_of, engine_of, header, open_folder, short, tracker_of
from research.stopping import Stop
from research.tensors import micro_batch
from research.tracking import NoTracker, Tracker
from research.world import joined

INTERRUPTED_BY = 128
"""Exit code of a run that a signal ended after its checkpoint: 128 + the signal's number, as shells report it."""

PROMPT_TOKENS = 6
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
    step: int = 0
    """Optimizer steps attempted so far."""
    best: tuple[float, int] | None = None
    """Lowest bits per byte so far and its step."""


def train(job: Job) -> None:
    """Trains the experiment of `job` from its first step to its last, or to a signal; ends with a checkpoint. Collective."""
    voice = Report() if job.ranks.rank == 0 else Silent()
    stop = Stop()
    with joined(job) as grid:
        folder = open_folder(job)
        header(job, folder, voice)
        status = FAILED
        try:
            corpus = corpus_of(job, voice)
            engine = engine_of(job, grid)
            run = Run(job, folder, corpus, engine, tracker_of(job, folder, engine, voice), voice, Meter(job.layout.tokens_per_step))
            try:
                steps_of(run, stop)
                finish(run)
                status = INTERRUPTED if stop.signal else FINISHED
            finally:
                run.tracker.finish(status)
                for note in run.tracker.notes:
                    voice.warn(note)
        finally:
            if grid.rank == 0:
                run_folder.end(folder, status)
    last_words(run)
    if stop.signal:
        raise SystemExit(INTERRUPTED_BY + stop.signal)


def steps_of(run: Run, stop: Stop) -> None:
    """Steps, and between them rows, validations and a look at whether to stop."""
    schedule = run.job.experiment.schedule
    run.voice.columns()
    run.meter.start()
    while run.step < schedule.steps and not stop.agreed():
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
    loss = run.engine.train_batch(map(micro_batch, batches), lr)
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
        found = evaluate.evaluate(run.engine, run.corpus.validation, run.job.experiment.model.seq_length)
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
    checkpoint.write(target, run.engine.full_weights(), facts(run), run.engine.grid)
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
        run.voice.warn(f"no sample: the whole model is large for this machine's free memory → python -m research sample {short(run.folder)}")
        return
    run.voice.sample(prompt, written)
    run.tracker.sample(int(axes["progress/step"]), int(axes["progress/tokens"]), prompt, written)


def first_words(run: Run) -> str:
    """The prompt: how the held-out text begins."""
    return run.corpus.tokenizer.decode(run.corpus.validation.tokens[:PROMPT_TOKENS].tolist())


def facts(run: Run) -> dict[str, object]:
    """What a checkpoint's manifest says of the run."""
    layout = run.job.layout
    return {
        "step": run.step,
        "samples": run.step * run.job.experiment.schedule.batch_size,
        "tokens": run.step * layout.tokens_per_step,
        "applied_steps": run.step - run.engine.skipped_steps,
        "layout": {"pipe": layout.pipe, "data": layout.data, "tensor": layout.tensor, "zero_stage": layout.zero_stage},
        "precision": run.job.experiment.precision,
        "data": run.corpus.fingerprint,
    }


def last_words(run: Run) -> None:
    """What to type next."""
    here, prompt = short(run.folder), shlex.quote(first_words(run))
    run.voice.next([f"python -m research sample {here} --prompt {prompt}", f"wandb leet {here}/wandb", "python -m research runs"])
