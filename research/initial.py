"""`init_from`: the checkpoint whose weights a run begins with, looked at before torch is imported."""

import hashlib
from pathlib import Path

from parallel import checkpoint_folder
from parallel.checkpoint_folder import MANIFEST
from parallel.errors import Mistake
from research.config import Experiment


def path_of(experiment: Experiment, root: Path) -> Path | None:
    """The checkpoint's folder, a relative one below `root`; None where weights are drawn."""
    return None if experiment.init_from is None else Path(root) / Path(experiment.init_from).expanduser()


def check(experiment: Experiment, root: Path) -> None:
    """A Mistake where `init_from` names no checkpoint."""
    path = path_of(experiment, root)
    if path is None or (path / MANIFEST).is_file():
        return
    newest = checkpoint_folder.newest_complete(path / "checkpoints") if (path / "checkpoints").is_dir() else None
    such = f"{experiment.init_from}/checkpoints/{newest.name}" if newest else "runs/NAME/ID/checkpoints/step_N"
    raise Mistake(f"init_from = {experiment.init_from!r}: {path} is not a checkpoint, it has no {MANIFEST} → name {such}")


def digest(experiment: Experiment, root: Path) -> str:
    """Of the checkpoint's manifest, which holds the digest of every file: 'drawn' where there is none, 'missing' where it is not here."""
    path = path_of(experiment, root)
    if path is None:
        return "drawn"
    return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()[:16] if (path / MANIFEST).is_file() else "missing"
