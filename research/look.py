"""A look at every step: is its loss finite, was its update skipped, is it out of the ordinary? What is wrong may end the run."""

import math
import shlex
from typing import TYPE_CHECKING

import numpy as np

from parallel.together import everyone
from research import incidents
from research.data import order
from research.data.batches import num_samples
from research.incidents import NON_FINITE, SPIKE, Incident, Suspect
from research.start import short

if TYPE_CHECKING:
    from research.train import Run


def at_step(run: "Run", loss: float, skipped: bool) -> None:
    """Called by all ranks after the step `run.step`, with what all of them know alike.

    DeepSpeed applies no update whose gradient norm is not finite, so the weights are those from before such a step. In fp16 a
    skipped step with a finite loss is the search for a loss scale, and no incident.
    """
    watch = run.job.experiment.watch
    run.skips_in_a_row = run.skips_in_a_row + 1 if skipped else 0
    searching = skipped and math.isfinite(loss) and run.job.experiment.precision == "fp16"
    if not math.isfinite(loss) or (skipped and not searching):
        said = describe(run, NON_FINITE, loss, suspects(run))
        if watch.non_finite == "stop":
            run.failure = f"{said}: stopped before the update → {replay(run)}, or go on past it with --resume {short(run.folder)}"
    elif not skipped and run.spikes.is_one(loss):
        limit = run.spikes.limit()
        said = describe(run, SPIKE, loss, [])
        if watch.on_spike == "stop":
            run.failure = f"{said}, above {limit:.3f}: stopped → {replay(run)}, or go on with --resume {short(run.folder)}"
    if not run.failure and watch.most_skips and run.skips_in_a_row >= watch.most_skips:
        run.failure = (
            f"step {run.step}: {run.skips_in_a_row} steps in a row were skipped, watch.most_skips = {watch.most_skips} → "
            "lower optimizer.lr, or set watch.most_skips 0 to go on for ever"
        )


def describe(run: "Run", kind: str, loss: float, found: list[Suspect]) -> str:
    """Writes the incident down and warns of it; returns what it says."""
    experiment = run.job.experiment
    batch = experiment.schedule.batch_size
    samples = range((run.step - 1) * batch, run.step * batch)
    every = num_samples(run.corpus.train, experiment.model.seq_length)
    incident = Incident(
        step=run.step,
        kind=kind,
        loss=_json(loss),
        grad_norm=_json(run.engine.gradient_norm()),
        samples=(samples.start, samples.stop),
        windows=[int(window) for window in order.sample(np.arange(samples.start, samples.stop), every, experiment.seed)],
        checkpoint=incidents.newest_before(run.folder, run.step),
        suspects=found,
    )
    if run.engine.grid.rank == 0:
        incidents.keep(run.folder, incident)
    run.voice.warn(f"{incident.said} · samples {samples.start}–{samples.stop - 1} · {short(run.folder)}/incidents")
    return incident.said


def suspects(run: "Run") -> list[Suspect]:
    """Of all ranks, those whose own gradients were not finite. Collective."""
    grid = run.engine.grid
    place = f"pipe {grid.pipe_rank}, data {grid.data_rank}, tensor {grid.tensor_rank}"
    return [Suspect(*told) for told in everyone((grid.rank, place, run.suspects.found()), grid) if told[2]]


def replay(run: "Run") -> str:
    """The command that runs the step again."""
    return f"`python -m research replay {shlex.quote(short(run.folder))} --step {run.step}`"


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else repr(value)
