"""Anomalies: steps whose loss or gradient is not finite, that are skipped, or whose loss is a spike. They may end the run.

Each is described in `incidents/step_000123.json` in the run's folder, so that `replay` can run the step again.
"""

import math
import shlex
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from parallel.checkpoint import folder as checkpoint_folder
from parallel.engines.engine import Engine
from parallel.engines.nonfinite import NonFiniteGradients
from parallel.errors import Mistake
from parallel.files import read_json, write_json
from parallel.object_collectives import all_gather_objects
from research.config import Experiment
from research.data.batches import Sampler
from research.tracking.console import Console
from research.tracking.metrics import finite
from research.tracking.run_folder import RunFolder
from research.tracking.tracker import Tracker
from research.training.locked_run import LockedRun

NON_FINITE, SPIKE = "non_finite", "spike"
WINDOW, LEAST = 100, 20
"""How many losses are remembered, and how many there must be before one can be a spike."""


class Spikes:
    """Detects a loss far above the recent ones. `threshold` is in standard deviations; 0: nothing is a spike."""

    def __init__(self, threshold: float, recent: Iterable[float] = ()) -> None:
        self.threshold = threshold
        self.recent: deque[float] = deque(recent, WINDOW)

    def is_one(self, loss: float) -> bool:
        """Whether this loss is a spike. It is remembered either way, so that a new level is soon the usual one."""
        unusual = self.threshold > 0 and len(self.recent) >= LEAST and loss > self.limit()
        if math.isfinite(loss):
            self.recent.append(loss)
        return unusual

    def limit(self) -> float:
        """The value above which a loss is a spike."""
        mean = sum(self.recent) / len(self.recent)
        deviation = math.sqrt(sum((loss - mean) ** 2 for loss in self.recent) / len(self.recent))
        return mean + self.threshold * deviation


@dataclass(frozen=True)
class Suspect:
    """A rank whose own gradients were not finite, and the parameters whose gradients they were."""

    rank: int
    place: str
    parameters: list[str]


@dataclass(frozen=True)
class Incident:
    """What went wrong in one step (counted from 1), on which samples, and from which checkpoint the step can be reached again."""

    step: int
    kind: str
    loss: float | str
    grad_norm: float | str
    samples: tuple[int, int]
    """The run's sample numbers, first and last + 1."""
    windows: list[int]
    """Where the samples lie in the training text: window i begins at token i · seq_length."""
    checkpoint: str | None
    """The newest checkpoint of at most `step` steps."""
    suspects: list[Suspect] = field(default_factory=list)

    @property
    def said(self) -> str:
        """'step 12: the loss is nan; rank 1 (data 1): blocks.0.attention.qkv.weight and 3 more'."""
        what = f"the loss is {self.loss}" if self.kind == SPIKE or isinstance(self.loss, str) else f"the gradient norm is {self.grad_norm}"
        who = []
        for suspect in self.suspects:
            more = f" and {len(suspect.parameters) - 1} more" if len(suspect.parameters) > 1 else ""
            who.append(f"rank {suspect.rank} ({suspect.place}): {suspect.parameters[0]}{more}")
        return "; ".join([f"step {self.step}: {what}", *who])


def path_of(folder: RunFolder, step: int) -> Path:
    """The file that describes a step."""
    return folder.incidents / f"step_{step:06d}.json"


def keep(folder: RunFolder, incident: Incident) -> None:
    """Writes the incident's file. Rank 0 only."""
    folder.incidents.mkdir(exist_ok=True)
    write_json(path_of(folder, incident.step), finite(asdict(incident)))


def load(folder: RunFolder, step: int) -> Incident:
    """Reads the incident of a step. The file is data and may be hostile."""
    path = path_of(folder, step)
    if not path.is_file():
        known = sorted(int(other.stem.removeprefix("step_")) for other in folder.incidents.glob("step_*.json"))
        there = f"there are incidents at {', '.join(map(str, known[:8]))}" if known else "the run had no incident"
        raise Mistake(f"{folder.title} has no incident at step {step} → {there}")
    try:
        told: dict[str, Any] = read_json(path)
        suspects = [Suspect(**suspect) for suspect in told.pop("suspects")]
        first, last = told.pop("samples")
        return Incident(**told, samples=(int(first), int(last)), suspects=suspects)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Mistake(f"{path} does not describe a step ({error}) → use what a run has written") from None


class AnomalyMonitor:
    """Looks at every step, with what all ranks know alike. `begin_step` and `check` are collective."""

    def __init__(
        self, experiment: Experiment, engine: Engine, sampler: Sampler, locked: LockedRun, console: Console, tracker: Tracker
    ) -> None:
        self.experiment, self.engine, self.locked, self.console, self.tracker = experiment, engine, locked, console, tracker
        self.folder = locked.folder
        self.sampler = sampler
        self.spikes = Spikes(experiment.watch.spike)
        self.non_finite = NonFiniteGradients(engine.parameters)
        self.skips_in_a_row = 0
        self._skipped_before = 0

    def begin_step(self, step: int) -> None:
        """Before `step`, counted from 1."""
        self.non_finite.clear()
        self._skipped_before = self.engine.skipped_steps

    def check(self, step: int, loss: float) -> str | None:
        """Writes down and reports what was wrong with `step`; returns why the run must stop, or None.

        DeepSpeed applies no update whose gradient norm is not finite, so the weights are those from before such a step. In fp16 a
        skipped step with a finite loss is the search for a loss scale, and no incident.
        """
        watch = self.experiment.watch
        skipped = self.engine.skipped_steps > self._skipped_before
        self.skips_in_a_row = self.skips_in_a_row + 1 if skipped else 0
        searching_scale = skipped and math.isfinite(loss) and self.experiment.precision == "fp16"
        failure = None
        if not math.isfinite(loss) or (skipped and not searching_scale):
            said = self._report(step, NON_FINITE, loss, self._suspects())
            if watch.non_finite == "stop":
                failure = f"{said}: stopped before the update → {self._replay(step)}, or go on past it with --resume {self.folder.shown}"
            else:  # of a stop, the loop tells W&B
                self.tracker.alert("skipped a step that is not finite", f"{said}: no update; training goes on")
        elif not skipped and self.spikes.is_one(loss):
            limit = self.spikes.limit()
            said = self._report(step, SPIKE, loss, [])
            if watch.on_spike == "stop":
                failure = f"{said}, above {limit:.3f}: stopped → {self._replay(step)}, or go on with --resume {self.folder.shown}"
        if not failure and watch.most_skips and self.skips_in_a_row >= watch.most_skips:
            failure = (
                f"step {step}: {self.skips_in_a_row} steps in a row were skipped, watch.most_skips = {watch.most_skips} → "
                "lower optimizer.lr, or set watch.most_skips 0 to go on for ever"
            )
        return failure

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"recent_losses": list(self.spikes.recent), "skips_in_a_row": self.skips_in_a_row}

    def restore(self, saved: dict[str, Any]) -> None:
        """Sets what `state` returned."""
        self.spikes = Spikes(self.spikes.threshold, [float(loss) for loss in saved["recent_losses"]])
        self.skips_in_a_row = int(saved["skips_in_a_row"])

    def _replay(self, step: int) -> str:
        return f"`python -m research replay {shlex.quote(self.folder.shown)} --step {step}`"

    def _suspects(self) -> list[Suspect]:
        """The ranks whose own gradients were not finite."""
        grid = self.engine.grid
        place = f"pipe {grid.pipe_rank}, data {grid.data_rank}, tensor {grid.tensor_rank}"
        own = Suspect(grid.rank, place, self.non_finite.found())
        return [suspect for suspect in all_gather_objects(own, grid) if suspect.parameters]

    def _report(self, step: int, kind: str, loss: float, suspects: list[Suspect]) -> str:
        """Writes the incident down and warns of it; returns the sentence that describes it."""
        samples = self.sampler.samples(step - 1)
        windows = self.sampler.locate(np.arange(samples.start, samples.stop)).windows
        before = [path for path in checkpoint_folder.steps(self.folder.checkpoints) if checkpoint_folder.step_of(path) <= step]
        incident = Incident(
            step=step,
            kind=kind,
            loss=finite(loss),
            grad_norm=finite(self.engine.gradient_norm()),
            samples=(samples.start, samples.stop),
            windows=[int(window) for window in windows],
            checkpoint=before[-1].name if before else None,
            suspects=suspects,
        )
        if self.engine.grid.rank == 0:
            self.locked.check()
            try:
                keep(self.folder, incident)
            except OSError as error:  # what it describes is said; a row that the disk refuses ends the run in order
                self.console.warn(f"{error.filename or self.folder.incidents} cannot be written ({error.strerror or error})")
        self.console.warn(f"{incident.said} · samples {samples.start}–{samples.stop - 1} · {self.folder.shown}/incidents")
        return incident.said
