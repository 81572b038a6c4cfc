"""Loads the checkpoint that a run resumes from. With `--resume auto`, a damaged one is set aside, and the newest whole one is loaded."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.damage import read_manifest
from parallel.checkpoint.load import load_checkpoint
from parallel.engines.engine import Engine
from parallel.errors import Mistake, SharedMistake
from parallel.object_collectives import broadcast_object
from research.cluster.exit_codes import DAMAGED
from research.config.diff import Change
from research.tracking import segments
from research.tracking.console import Console
from research.tracking.run_folder import RunFolder
from research.training.locked_run import LockedRun


@dataclass(frozen=True)
class Start:
    """Where a run is resumed, as every rank knows it."""

    folder: RunFolder
    checkpoint: Path
    step: int
    changes: list[Change]
    """The settings that differ from the checkpoint's."""


def load_newest_whole(start: Start, is_auto: bool, locked: LockedRun, engine: Engine, console: Console) -> tuple[Start, dict[str, Any]]:
    """The start from the newest checkpoint whose hashes are right, and its facts. The engine has its state then. Collective.

    Unless `is_auto`, damage is a Mistake: the checkpoint was chosen by its name. Rows later than the older checkpoint are removed.
    """
    while True:
        try:
            return start, load_checkpoint(start.checkpoint, engine)
        except Mistake as mistake:  # every rank raises one with this code, or none does
            if mistake.code != DAMAGED or not is_auto:
                raise
            damage = str(mistake).partition(" → ")[0]
        older = Path(broadcast_object(_set_aside(start, damage, locked) if engine.grid.rank == 0 else ""))
        if not older.name:
            sentence = f"{damage}; {start.folder.title} has no other whole checkpoint → begin a run of its own, without --resume"
            raise SharedMistake(sentence, reports=engine.grid.rank == 0, code=DAMAGED)
        console.warn(f"{damage} → it is set aside, and the run goes on from {older.name} instead", in_header=True)
        start = replace(start, checkpoint=older, step=read_manifest(older).facts["step"])


def _set_aside(start: Start, damage: str, locked: LockedRun) -> str:
    """Sets the damaged checkpoint aside; returns the path of the newest older one that seems whole, '' if there is none. Rank 0 only."""
    locked.check()
    checkpoints = start.folder.checkpoints
    checkpoint_folder.set_aside([start.checkpoint])
    before = [path for path in checkpoint_folder.steps(checkpoints) if checkpoint_folder.step_of(path) < start.step]
    older, damaged = checkpoint_folder.newest_whole(before)
    checkpoint_folder.set_aside(damaged)
    if older is None:
        return ""
    passed_over = {start.checkpoint.name: damage} | {path.name: what for path, what in damaged.items()}
    segments.rewind(start.folder, read_manifest(older).facts["step"], older.name, passed_over)
    return str(older)
