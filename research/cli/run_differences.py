"""What tells runs apart: settings that the command line changed, and settings that differ between runs. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.config import serialization
from research.config.diff import belongs, flatten
from research.tracking.run_folder import RunFolder
from research.training.continuation import RECORDED

DESCRIPTIVE = ("schema", "question", "parent", "changes", "track", "data.cache")
"""Settings, or groups of them, that say nothing about what a run computes."""
UNCHANGING = ("checkpoints", *RECORDED)
"""Further ones that do not change the training, only what is recorded of it."""

Settings = Mapping[str, Any]
"""By dotted name, as a config.json of the newest schema has them."""


def settings_of(folder: RunFolder) -> Settings:
    """The settings of a run that may change its training; none if its config.json cannot be read."""
    try:
        settings = flatten(serialization.resolved(serialization.load(folder.config)))
    except ValueError:  # a Mistake is one
        return {}
    return {name: value for name, value in settings.items() if not belongs(name, (*DESCRIPTIVE, *UNCHANGING))}


def differing(runs: Sequence[Settings]) -> list[str]:
    """The names of settings that do not have the same value in all runs. Settings that only some of the runs know are left out."""
    known = [run for run in runs if run]
    shared = [name for name in known[0] if all(name in run for run in known)] if known else []
    return [name for name in shared if any(run[name] != known[0][name] for run in known)]


def labels(runs: Sequence[tuple[RunFolder, Settings]]) -> list[str]:
    """A short name for each run that tells it apart from the others: '7f3a2c · lr 0.003 · seed 1'.

    The experiment's name is part of it if the runs are of several experiments.
    """
    names = differing([settings for _, settings in runs])
    last = [name.rpartition(".")[2] for name in names]
    shown = {name: short if last.count(short) == 1 else name for name, short in zip(names, last, strict=True)}
    several = len({folder.name for folder, _ in runs}) > 1 or len(runs) == 1
    return [
        " · ".join([folder.title if several else folder.id, *(f"{shown[name]} {settings[name]}" for name in names if name in settings)])
        for folder, settings in runs
    ]
