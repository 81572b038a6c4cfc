"""A run's checkpoints while it trains: when one is saved, what it remembers beside the engine's state, and which older ones are deleted."""

import time
from pathlib import Path
from typing import Any

from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.folder import name_of
from parallel.checkpoint.saver import BackgroundSaver, Saver
from parallel.checkpoint.writer import Saved
from parallel.errors import Mistake
from research.cluster.environment import git_state
from research.cluster.software import digest_of
from research.config.serialization import config_hash
from research.reliability.heartbeat import Stage
from research.tracking import run_folder
from research.tracking.metrics import finite
from research.training.anomalies import AnomalyMonitor
from research.training.periodic import Periodic
from research.training.state import Run


class Checkpointer:
    """Saves the run at once, or from a copy while training goes on where `checkpoints.background` is set. All methods are collective."""

    def __init__(self, run: Run, anomalies: AnomalyMonitor, periodic: Periodic) -> None:
        self.run, self.anomalies, self.periodic = run, anomalies, periodic
        check = run.locked.check
        self.saver = BackgroundSaver(check=check) if run.job.experiment.checkpoints.background else Saver(check=check)
        self.saved_step = -1
        """The step of the newest checkpoint that was begun or resumed from; −1 for none."""
        self.unreported = False
        """Whether a checkpoint was begun that `poll` has not reported yet; equal on every rank."""
        self._is_latest = False
        """Whether runs/NAME/latest has been set since this launch saved its first checkpoint."""
        self.origin = {
            "config": config_hash(run.job.experiment),
            "commit": git_state(run.job.root)[0],
            "code": digest_of(run.job.library),
            "data": run.corpus.fingerprint,
        }

    def save(self) -> None:
        """Begins (or writes) the checkpoint of this step. The time it takes is not counted as training time."""
        run = self.run
        shown = run.console.progress("saving", announced=False)
        with run.progress.work("saving", Stage.SAVING), run.meter.paused("saving"), shown:
            self.saver.save(run.folder.checkpoints / name_of(run.step), run.engine, self.facts())
        self.saved_step, self.unreported = run.step, True

    def poll(self) -> None:
        """Reports what has been published since the last call, and deletes checkpoints that are not to be kept."""
        self._report(self.saver.poll())

    def save_last(self) -> float:
        """Completes the checkpoint of the last step, unless there is one already. Returns the seconds it took."""
        began, run = time.monotonic(), self.run
        if self.saved_step != run.step:
            self.save()
        self._report([saved for saved in self.saver.wait() if saved.folder.name != name_of(run.step)])
        self._retain()
        return time.monotonic() - began

    def facts(self) -> dict[str, Any]:
        """What the manifest says of the run, as JSON. Equal on every rank except for the clock; rank 0's is kept."""
        run = self.run
        layout = run.job.layout
        return {
            "step": run.step,
            "samples": layout.batch_sizes.before(run.step),
            "tokens": layout.tokens_before(run.step),
            "applied_steps": run.step - run.engine.skipped_steps,
            **self.origin,
            "run": {
                "seconds": run.meter.seconds(),
                "best": self.periodic.best,
                "validate_tokens": run.job.experiment.schedule.validate_tokens,
                "interval_losses": finite(run.meter.losses),
                **self.anomalies.state(),
                "due": list(self.periodic.due),
                "waiting_rows": run.tracker.waiting,
            },
        }

    def restore(self, facts: dict[str, Any]) -> None:
        """Sets what `facts` of a checkpoint says. It is read from a file, so a Mistake is raised where it says something else."""
        saved = facts.get("run")
        try:
            self.run.step = self.saved_step = facts["step"]
            self.run.meter.resume(float(saved["seconds"]), [float(loss) for loss in saved["interval_losses"]])  # type: ignore[index]
            self.anomalies.restore(saved)  # type: ignore[arg-type]
            self.periodic.restore(saved)  # type: ignore[arg-type]
            self.run.tracker.write_missing(saved.get("waiting_rows", {}))  # type: ignore[union-attr]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Mistake(f"the checkpoint does not say how its run stood ({error!r:.100}) → use another checkpoint of the run") from None

    def _report(self, published: list[Saved]) -> None:
        for saved in published:
            self.unreported = self.unreported and saved.folder.name != name_of(self.saved_step)
            self.run.console.saved(saved.folder.name, saved.seconds)
        if published:
            self._retain()

    def _retain(self) -> None:
        keep = self.run.job.experiment.checkpoints
        if self.run.engine.grid.rank > 0:
            return
        self.run.locked.check()
        checkpoint_folder.retain(self.run.folder.checkpoints, keep.keep_last, keep.keep_every)
        self.run.tracker.refer_to_checkpoints(keep.keep_every)
        if not self._is_latest:
            run_folder.point_latest(self.run.folder.path.parent)
            self._is_latest = True


def refuse_other_data(facts: dict[str, Any], fingerprint: Any, checkpoint: Path) -> None:
    """Raises a Mistake if the text or the tokenizer is not what the checkpoint's run was trained on, whatever its name."""
    if facts.get("data") != fingerprint:
        then, now = str(facts.get("data"))[:60], str(fingerprint)[:60]
        raise Mistake(
            f"the data is not what {checkpoint} was trained on (fingerprint {then} → {now}) → "
            "put the old files back, or begin a run of its own (without --resume)"
        )
