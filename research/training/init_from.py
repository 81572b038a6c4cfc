"""`init_from`: the checkpoint whose weights a new run begins with, and what can be said of it before torch is imported."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.folder import MANIFEST
from parallel.errors import Mistake
from parallel.files import user_path
from research.config import Experiment, serialization
from research.data.run_tokenizer import same_tokenizer


def init_from_path(experiment: Experiment, root: Path) -> Path | None:
    """The folder of the checkpoint that `init_from` names, relative to `root`; None if weights are drawn."""
    return None if experiment.init_from is None else user_path(root, experiment.init_from)


def check_init_from(experiment: Experiment, root: Path) -> None:
    """Raises a Mistake if `init_from` is set and names no checkpoint."""
    path = init_from_path(experiment, root)
    if path is None or (path / MANIFEST).is_file():
        return
    newest = checkpoint_folder.newest_complete(path / "checkpoints") if (path / "checkpoints").is_dir() else None
    such = f"{experiment.init_from}/checkpoints/{newest.name}" if newest else "runs/NAME/ID/checkpoints/step_N"
    raise Mistake(f"init_from = {experiment.init_from!r}: {path} is not a checkpoint, it has no {MANIFEST} → name {such}")


def doubts_of_init_from(experiment: Experiment, root: Path) -> Iterator[str]:
    """A warning if the weights that a run begins with know other tokens, as far as the folder of their run tells."""
    path, now = init_from_path(experiment, root), experiment.data
    config = path.parent.parent / "config.json" if path else None
    if config is None or not config.is_file():
        return
    then = serialization.load(config).data
    if not same_tokenizer(then, now, root):
        trained = f" trained on {then.train!r}, not on {now.train!r}" if then.tokenizer == now.tokenizer else f", not {now.tokenizer!r}"
        yield (
            f"init_from = {experiment.init_from!r}: its weights know the tokens of {then.tokenizer!r}{trained}, so that the ids mean "
            "other text → set data.tokenizer to the tokenizer.json that `python -m research export` writes for that run"
        )


def init_from_digest(experiment: Experiment, root: Path) -> str:
    """A digest of the manifest, which holds the digest of every file; 'drawn' without init_from, 'missing' if it is not on this host."""
    path = init_from_path(experiment, root)
    if path is None:
        return "drawn"
    return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()[:16] if (path / MANIFEST).is_file() else "missing"
