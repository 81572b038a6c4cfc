"""Weights & Biases as a mirror of metrics.jsonl. The only file that imports wandb, and it does so only when a run starts.

A run must never fail or wait because of W&B. So the mode is decided before `wandb.init`: online needs a key *and* a server
that answers; everything else is an offline run on disk, which `wandb sync` uploads later. Start and finish are each held to
ten seconds; a row is written to metrics.jsonl first; whatever W&B raises is turned into one sentence in `Tracker.notes`.

W&B writes through a process of its own, which can die before the run does: Ctrl-C on the `deepspeed` command ends it. An offline
run then has no rows, so `finish` writes it again from metrics.jsonl.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from research.tracking import wandb_mirror
from research.tracking.metrics import JsonLines, plain
from research.tracking.run_folder import FINISHED, RunFolder
from research.tracking.wandb_mirror import AXES, RunDescription, Tracked, WandbMirror


class Tracker:
    """Rank 0's record of a run: metrics.jsonl and samples.jsonl first, then W&B. Nothing here raises because of W&B."""

    def __init__(self, folder: RunFolder, track: Tracked, about: RunDescription, after: int = 0):
        """Open the files and the W&B run; takes at most ten seconds whatever the network does.

        `after`: the step of the checkpoint that the run goes on from. Online it goes on in the same W&B run; offline it is another
        folder with the same id, which `wandb sync` joins to the first.
        """
        self._metrics, self._samples = JsonLines(folder.metrics), JsonLines(folder.samples)
        self.notes: list[str] = []
        """What went wrong with W&B, a sentence each; whoever shows one takes it out."""
        self._wandb = WandbMirror(folder, track, about, self.notes, after)
        if after:
            self._wandb.log({"progress/resumed_at": after, AXES[0]: after})

    @property
    def line(self) -> str:
        """The header's line: where W&B's rows go and what to do with them later."""
        return self._wandb.line

    def log(self, row: Mapping[str, Any]) -> None:
        """One row, e.g. {"train/loss": 2.0, "progress/step": 10, "progress/tokens": 20480}. It must hold both axes."""
        missing = [axis for axis in AXES if axis not in row]
        if missing:
            raise KeyError(f"a row without {', '.join(missing)} cannot be drawn")
        self._metrics.write(row)
        self._wandb.log(plain(row))

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """What the model wrote after one step: rows of both axes, prompt, text, finish (why it ended), one for each prompt.

        In W&B each is a row, too, and all of the run so far are one table, `samples`.
        """
        for row in rows:
            self._samples.write(row)
        for row in rows:
            self._wandb.log(wandb_mirror.sample_row(row))
        self._wandb.log_table()

    def finish(self, status: str = FINISHED) -> None:
        """Close everything; `status` is finished, interrupted or failed. At most ten seconds; a second call does nothing."""
        self._metrics.close()
        self._samples.close()
        self._wandb.finish(exit_code=0 if status == FINISHED else 1)


class NoTracker:
    """The tracker of ranks > 0: a run is one W&B run and one metrics.jsonl, whatever the world size."""

    line = ""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def log(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing."""

    def finish(self, status: str = FINISHED) -> None:
        """Nothing."""
