"""A run's checkpoints while it trains: when one is saved, what is said of it, which older ones stay."""

import time
from typing import TYPE_CHECKING

from parallel import checkpoint
from research import state
from research.config import Experiment

if TYPE_CHECKING:
    from research.train import Run


def saver_of(experiment: Experiment) -> checkpoint.Saver:
    """The one that the experiment asks for: at once, or from a copy while training goes on."""
    return checkpoint.BackgroundSaver() if experiment.checkpoints.background else checkpoint.Saver()


def name_of(step: int) -> str:
    """A checkpoint's folder."""
    return f"step_{step:06d}"


def save(run: "Run") -> None:
    """Begins, or makes, the checkpoint of this step. Its time is not counted as training time. Collective."""
    with run.meter.paused("saving"):
        run.saver.save(run.folder.checkpoints / name_of(run.step), run.engine, state.facts(run))
    run.saved_step = run.step


def poll(run: "Run") -> None:
    """Says what has been published since the last call, and lets go of what need not stay. Collective."""
    _published(run, run.saver.poll())


def save_last(run: "Run") -> float:
    """The checkpoint of the last step, complete, unless it is there; returns seconds. Collective."""
    began = time.monotonic()
    if run.saved_step != run.step:
        save(run)
    _published(run, [saved for saved in run.saver.wait() if saved.folder.name != name_of(run.step)])
    _retain(run)
    return time.monotonic() - began


def _published(run: "Run", found: list[checkpoint.Saved]) -> None:
    for saved in found:
        run.voice.saved(saved.folder.name, saved.seconds)
    if found:
        _retain(run)


def _retain(run: "Run") -> None:
    keep = run.job.experiment.checkpoints
    if run.engine.grid.rank == 0:
        checkpoint.retain(run.folder.checkpoints, keep.keep_last, keep.keep_every)
