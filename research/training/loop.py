"""The training loop."""

import contextlib
import signal
import sys
from collections.abc import Iterator

import torch.distributed as dist

from parallel.distributed import use_deterministic_kernels
from parallel.engines.micro_batch import MicroBatch
from parallel.errors import Mistake
from parallel.object_collectives import together
from research.cluster.exit_codes import SIGNALLED, TAKEN
from research.cluster.world import joined
from research.reliability.heartbeat import Stage
from research.reliability.parents import Parents
from research.reliability.signals import leave_when_asked
from research.reliability.watchdog import watchdog
from research.tracking.console import Console
from research.tracking.metrics import perplexity
from research.tracking.run_folder import FAILED, FINISHED, INTERRUPTED
from research.training import preflight, setup
from research.training.anomalies import AnomalyMonitor
from research.training.checkpointer import Checkpointer
from research.training.finish import finish, show_next_commands
from research.training.job import Job
from research.training.locked_run import deleted, disk_errors
from research.training.periodic import Periodic
from research.training.profiler import StepProfiler
from research.training.schedule import learning_rate
from research.training.state import Run

TRIM_STEPS = 100
"""Steps between two calls of malloc_trim, on every rank."""


def train(job: Job, parents: Parents) -> None:
    """Trains the experiment of `job`, from its first step or a checkpoint, to its last step or a signal. Collective.

    Returns when the run is finished; raises SystemExit(WATCHED) where it has stopped itself, 128 + n after signal n, and the code of a
    trouble with its folder (research/training/locked_run.py). The job's locks are given up in any case.
    """
    ranks, experiment, layout = job.ranks, job.experiment, job.experiment.parallel
    console = Console(quiet=ranks.rank > 0)
    if experiment.deterministic:
        use_deterministic_kernels()
    with contextlib.ExitStack() as stack:
        stack.callback(job.close)
        limits = experiment.watch
        watch = stack.enter_context(watchdog(ranks, job.root, limits.hang_seconds, parents, limits.rendezvous_seconds))
        job, variants, rendezvous = preflight.meet(job, console, watch)
        grid = stack.enter_context(
            joined(ranks, layout.pipe, layout.tensor, layout.sequence, experiment.precision, job.verbose, rendezvous)
        )
        resumed = setup.agree_on_resume(job)
        locked = setup.open_folder(job, grid, resumed)

        def has_begun() -> bool:
            """Whether there are steps to go on from."""
            return resumed is not None or watch.progress.step > 0

        status, failure, code, refused = FAILED, "", 0, False
        try:
            leave_when_asked()
            with watch.together(locked.folder, locked.view), disk_errors(locked.folder.path, has_begun):
                setup.header(job, locked.folder, console)
                run, anomalies, periodic, checkpointer = setup.prepare_run(job, locked, grid, console, resumed, watch, variants)
                status = train_and_finish(run, anomalies, periodic, checkpointer)
                failure, code = run.failure or "", run.code if run.failure else 0
        except SystemExit:  # a signal came before the first step
            status = INTERRUPTED
            raise
        except Mistake as mistake:
            refused, failure, code = not has_begun(), str(mistake), mistake.code
            raise
        finally:
            if refused:  # the run has not begun, and nothing in its folder is worth keeping
                locked.discard()
            else:
                locked.end(status, failure or watch.reason, code)
        show_next_commands(run)
        dist.barrier()  # the first rank to leave with an exit code makes a launcher end the others
    if run.failure:
        if ranks.rank == 0:
            sys.stderr.write(f"error  {run.failure}\n")
        raise SystemExit(run.code)
    if status == INTERRUPTED:
        raise SystemExit(SIGNALLED + run.stop.signal)


def train_and_finish(run: Run, anomalies: AnomalyMonitor, periodic: Periodic, checkpointer: Checkpointer) -> str:
    """All steps, or those before a signal, and the last checkpoint; returns the run's status. The tracker is closed whatever happens."""
    status = FAILED
    try:
        train_steps(run, anomalies, periodic, checkpointer)
        with run.progress.work("saving", Stage.SAVING):
            stopped(run)  # the disk may have refused a row of the last step
            if finished := not run.stop.trouble:
                finish(run, checkpointer)
                stopped(run)  # or the sample at the end
            if run.stop.trouble:
                finish_in_trouble(run, checkpointer, finished)
        if not run.failure:
            complete = run.step >= run.job.experiment.schedule.steps and not periodic.due
            status = FINISHED if complete else INTERRUPTED
    finally:
        run.progress.advance("closing the tracker", Stage.LEAVING)
        if status != FINISHED:
            alert_of_end(run, status)
        run.tracker.finish(status)
        setup.show_notes(run.tracker, run.console)
    return status


def finish_in_trouble(run: Run, checkpointer: Checkpointer, finished: bool) -> None:
    """Ends a run whose disk is full or whose folder was deleted: with a last checkpoint if one can be written, and with the reason.

    `finished`: `finish` has been called already. A run that has stopped itself in the same step keeps that reason and its exit code.
    """
    is_gone = run.stop.trouble == TAKEN
    trouble = f"{run.tracker.failure or 'the disk of rank 0 is full'} → make room on its disk, then go on with --resume auto"
    if is_gone:
        trouble = deleted(run.folder.path)
        checkpointer.saved_step = -1  # whatever was saved is gone, too
        with together(run.engine.grid):
            run.locked.restore()
    run.tracker.write_waiting()
    try:
        if is_gone or not finished:
            finish(run, checkpointer)
    except Mistake as mistake:  # every rank raises the same
        trouble = f"{trouble.partition(' → ')[0]}, and no last checkpoint could be written: {mistake}"
    if run.failure:
        run.failure = f"{run.failure}; and {trouble}"
    else:
        run.failure, run.code = trouble, run.stop.trouble


def alert_of_end(run: Run, status: str) -> None:
    """Tells W&B that the run has ended before its last step, and why."""
    error = sys.exc_info()[1]
    stopped = signal.Signals(run.stop.signal).name if run.stop.signal else "it was asked to stop"
    why = run.failure or (f"{type(error).__name__}: {error}" if error else stopped)
    text = f"after step {run.step} of {run.job.experiment.schedule.steps}: {why}"
    run.tracker.alert(status, text, "WARN" if status == INTERRUPTED else "ERROR")


def train_steps(run: Run, anomalies: AnomalyMonitor, periodic: Periodic, checkpointer: Checkpointer) -> None:
    """Optimizer steps until the last one, a signal, or an anomaly that ends the run."""
    schedule, optimizer, checkpoints = run.job.experiment.schedule, run.job.experiment.optimizer, run.job.experiment.checkpoints
    pauses = periodic.intervals | {"saving": checkpoints.every}
    profiler = StepProfiler(run)
    run.console.columns()
    run.meter.start()
    periodic.carry_out(periodic.due)  # what the signal that ended the segment before this one has left undone
    while run.step < schedule.steps and not run.failure and not periodic.due and not stopped(run):
        run.progress.stepping(run.step + 1)
        anomalies.begin_step(run.step + 1)
        lr = learning_rate(run.step, optimizer, schedule.steps, run.variants)
        with profiler.step(run.step + 1):
            batches = profiler.batches(run.meter.waited_for(step_batches(run)))
            loss = run.engine.train_batch(batches, lr, run.job.layout.micro_batches_of(run.step))
        run.meter.step(loss, run.job.layout.tokens_before(run.step + 1) - run.job.layout.tokens_before(run.step))
        run.step += 1
        run.failure = anomalies.check(run.step, loss)

        # once in a while: a row for the terminal, metrics.jsonl and W&B
        if run.failure or run.step in (1, schedule.steps) or run.step % schedule.log_every == 0:
            log_interval(run, lr, pauses)
        if run.failure:
            break
        # once in a while: validation, tasks, samples
        periodic.after(run.step)
        # once in a while: a checkpoint
        if run.step < schedule.steps and checkpoints.every and run.step % checkpoints.every == 0:
            checkpointer.save()
        if checkpointer.unreported:
            checkpointer.poll()
        # once in a while: what the heap holds and nobody uses goes back to the kernel
        if run.step % TRIM_STEPS == 0:
            run.meter.memory.trim()
    profiler.close()


def stopped(run: Run) -> bool:
    """Whether a rank was asked to stop, or has found a trouble that ends the run; equal on every rank. Collective."""
    run.note_trouble()
    return bool(run.stop.agreed())


def step_batches(run: Run) -> Iterator[MicroBatch]:
    """This data rank's micro-batches of the next step."""
    batches = run.sampler.micro_batches(run.step, run.engine.grid.data_rank, run.engine.grid.data)
    return (MicroBatch.of(batch.ids, batch.labels, batch.context) for batch in batches)


def log_interval(run: Run, lr: float, pauses: dict[str, int]) -> None:
    """The row of the steps since the last one: their mean loss and speed, the last one's learning rate and gradient norm."""
    interval = run.meter.interval()
    row = {
        "train/loss": interval.loss,
        "train/ppl": perplexity(interval.loss),
        "train/lr": lr,
        "train/grad_norm": run.engine.gradient_norm(),
        "perf/tokens_per_second": interval.tokens_per_second,
        "perf/step_ms": interval.step_ms,
        "perf/data_ms": interval.data_ms,
        **run.meter.memory_row(),
        **run.axes(),
    }
    run.tracker.log(row)
    steps, layout = run.job.experiment.schedule.steps, run.job.layout
    tokens = layout.tokens_before(steps) - layout.tokens_before(run.step)
    run.console.train(row, run.meter.seconds_left(run.step, steps, tokens, pauses))
