"""Records a run: metrics.jsonl and samples.jsonl first, then Weights & Biases (research/tracking/wandb_mirror.py)."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.tracking import wandb_artifacts
from research.tracking.metrics import JsonLines, plain
from research.tracking.run_folder import FINISHED, RunFolder
from research.tracking.wandb_client import AXES, RunDescription
from research.tracking.wandb_mirror import WandbMirror
from research.tracking.wandb_record import sample_row

METRICS, SAMPLES = "metrics", "samples"


class Tracker:
    """The record of a run. Rank 0's writes; those of the other ranks are quiet, so a run has one metrics.jsonl and one W&B run.

    No method raises because of W&B.
    """

    def __init__(
        self,
        folder: RunFolder,
        description: RunDescription | None,
        mode: str,
        after: int = 0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Opens the files and begins to open the W&B run; waits at most ten seconds for that, whatever the machine or the network does.

        `mode` is auto, online, offline or disabled. `after` is the step of the checkpoint that the run resumes from: online it goes on
        in the same W&B run; offline W&B writes another folder with the same id, which `wandb sync` joins to the first.
        `description` is what W&B is told of the run. None makes a quiet tracker: nothing is opened and nothing is written.
        `check` is called before a file of the run is written; it does not return if the run is not this process's any more.
        """
        self.notes: list[str] = []
        """What went wrong with W&B, one sentence each; whoever shows one removes it."""
        self.failure = ""
        """Why a row could not be written, as the beginning of a sentence: 'runs/…/metrics.jsonl cannot be written (No space left …)'.

        The row is kept, and is written before the next one or at the end, if it can be by then.
        """
        self._check = check
        self._quiet = description is None
        if description is None:
            return
        self._folder, self._referred = folder, set[str]()
        self._metrics, self._samples = JsonLines(folder.metrics), JsonLines(folder.samples)
        self._wandb = WandbMirror(folder, description, mode, self.notes, after)
        if after:
            self._wandb.log({"progress/resumed_at": after, AXES[0]: after})

    @property
    def line(self) -> str:
        """The header's line: where W&B's rows go and how to upload them later, as far as it is known by now."""
        return "" if self._quiet else self._wandb.line

    def log(self, row: Mapping[str, Any]) -> None:
        """Writes one row, e.g. {"train/loss": 2.0, "progress/step": 10, "progress/tokens": 20480}. It must have both axes."""
        if self._quiet:
            return
        missing = [axis for axis in AXES if axis not in row]
        if missing:
            raise KeyError(f"a row without {', '.join(missing)} cannot be drawn")
        self._write(self._metrics, row)
        self._wandb.log(plain(row))

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes what the model generated after one step, one row per prompt: both axes, prompt, text, finish (why it ended).

        In W&B, too, each sample is a row; in addition all samples of the run so far are one table, `samples`.
        """
        if self._quiet:
            return
        for row in rows:
            self._write(self._samples, row)
        for row in rows:
            self._wandb.log(sample_row(row))
        self._wandb.log_table()

    def write_waiting(self) -> None:
        """Writes the rows that the disk has refused, if it takes them now."""
        if not self._quiet:
            with contextlib.suppress(OSError):
                self._metrics.write_waiting()
                self._samples.write_waiting()

    @property
    def waiting(self) -> dict[str, list[str]]:
        """The rows that the disk has refused, by file, for a checkpoint to keep."""
        files = {} if self._quiet else {METRICS: self._metrics, SAMPLES: self._samples}
        return {name: file.waiting for name, file in files.items() if file.waiting}

    def write_missing(self, rows: Mapping[str, Sequence[str]]) -> None:
        """Writes the rows that were `waiting` when the checkpoint was saved, unless the files have got them since."""
        if not self._quiet:
            self._metrics.write_missing(map(str, rows.get(METRICS, ())))
            self._samples.write_missing(map(str, rows.get(SAMPLES, ())))

    def alert(self, what: str, text: str, level: str = "WARN") -> None:
        """A notification that W&B sends: `what` has happened to this run, in full `text`; `level` is INFO, WARN or ERROR."""
        if not self._quiet:
            self._wandb.alert(f"{what} · {self._folder.title}", text, level)

    def refer_to_checkpoints(self, every: int) -> None:
        """Tells W&B where the complete checkpoints are whose step is a multiple of `every` (0: none), each once."""
        for path in [] if self._quiet else wandb_artifacts.checkpoints(self._folder, every):
            if path.name not in self._referred:
                self._referred.add(path.name)
                self._wandb.refer_to(functools.partial(wandb_artifacts.of_checkpoint, self._folder, path))

    def refer_to_store(self, prefix: Path, facts: Mapping[str, Any]) -> None:
        """Tells W&B where the token store PREFIX.bin, .idx and .json is, and what is known of it."""
        if not self._quiet:
            self._wandb.refer_to(functools.partial(wandb_artifacts.of_store, prefix, facts))

    def finish(self, status: str = FINISHED) -> None:
        """Closes everything; `status` is finished, interrupted or failed. A second call does nothing.

        W&B has ten seconds for what it still has to write; an offline run that has finished has twenty.
        """
        if self._quiet:
            return
        self._check()
        self._metrics.close()
        self._samples.close()
        self._wandb.finish(exit_code=0 if status == FINISHED else 1)

    def _write(self, file: JsonLines, row: Mapping[str, Any]) -> None:
        self._check()
        try:
            file.write(row)
        except OSError as error:
            self.failure = self.failure or f"{error.filename} cannot be written ({error.strerror})"
