"""What tells runs apart: settings that the command line changed, and settings that differ between runs. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from parallel.files import read_json
from research.config.diff import flatten
from research.tracking.run_folder import RunFolder

OF_THE_RECORD = ("schema", "question", "parent", "track", "data.cache")
"""Settings, or groups of them, that say nothing about what a run computes."""
OF_THE_WATCH = ("evaluate", "sample", "checkpoints", "watch", "schedule.log_every", "schedule.validate_every")
"""Further ones that do not change the training."""

Settings = Mapping[str, Any]
"""By dotted name, as in config.json."""


def settings_of(folder: RunFolder) -> Settings:
    """The settings of a run that may change its training; none if its config.json cannot be read."""
    try:
        settings = flatten(read_json(folder.config))
    except (OSError, ValueError, AttributeError):
        return {}
    return {name: value for name, value in settings.items() if not belongs(name, (*OF_THE_RECORD, *OF_THE_WATCH))}


def belongs(name: str, groups: Sequence[str]) -> bool:
    """Whether a setting is one of these, or in one of these groups."""
    return any(name == group or name.startswith(f"{group}.") for group in groups)


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
