"""A training run under way on one rank: what its loop, its periodic work, its checkpoints and its end all need."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parallel.engines.engine import Engine
from research.cluster.exit_codes import DISK, TAKEN, WATCHED
from research.data.batches import Sampler
from research.data.prepare import Corpus
from research.reliability.heartbeat import Progress
from research.reliability.signals import Stop
from research.tracking.console import Console
from research.tracking.run_folder import RunFolder
from research.tracking.tracker import Tracker
from research.training.job import Job
from research.training.locked_run import LockedRun
from research.training.meter import Meter


@dataclass
class Run:
    """One run on one rank. `step` and `failure` are equal on every rank."""

    job: Job
    locked: LockedRun
    folder: RunFolder
    variants: Mapping[str, Any]
    """The classes and functions of variant.py that the experiment names."""
    corpus: Corpus
    sampler: Sampler
    engine: Engine
    tracker: Tracker
    console: Console
    meter: Meter
    stop: Stop
    progress: Progress
    """What this rank is doing, for the watchdog's threads to read."""
    step: int = 0
    """Optimizer steps attempted so far."""
    failure: str | None = None
    """Why the run stops itself after this step, as a sentence."""
    code: int = WATCHED
    """The exit code of a run with a failure."""

    def note_trouble(self) -> None:
        """Asks all ranks to stop if the disk has refused a row, or the run's folder was deleted. Found by rank 0."""
        if self.tracker.failure:
            if not self.stop.trouble:
                self.console.warn(f"{self.tracker.failure}: the run stops, with a last checkpoint if there is room for one")
            self.stop.demand(DISK)
        if self.locked.was_deleted:
            self.stop.demand(TAKEN)

    def axes(self) -> dict[str, float]:
        """The axes of a row of metrics.jsonl."""
        layout = self.job.layout
        return {
            "progress/step": self.step,
            "progress/tokens": layout.tokens_before(self.step),
            "progress/samples": layout.batch_sizes.before(self.step),
            "progress/applied_steps": self.step - self.engine.skipped_steps,
            "progress/seconds": self.meter.seconds(),
        }
