"""Differences between two experiments' settings, by dotted name: what resuming compares and a run reports."""

from collections.abc import Iterable
from typing import Any

from research.config.examples import EXAMPLES, check_examples, describe_examples
from research.config.schema import Experiment
from research.config.serialization import resolved
from research.config.sources import TRAIN, Source, describe_texts

PLUMBING = (
    "schema",
    "question",
    "parent",
    "changes",
    "schedule.micro_batch_size",
    "schedule.validate_every",
    "schedule.validate_tokens",
    "schedule.log_every",
    "data.cache",
    "parallel",
    "checkpoints",
    "watch",
    "profile",
    "deterministic",
    "evaluate",
    "sample",
    "track",
)
"""Settings, or groups of them, that affect no result: they describe, record, or change speed and memory. All others are science."""
MODEL = "model"
MOST = 8
"""The most differences that one sentence lists."""

Change = tuple[str, Any, Any]
"""(dotted name, old value, new value)."""


def diff(then: Experiment, now: Experiment) -> list[Change]:
    """Every setting that differs, by dotted name, in the order of the schema.

    Models of two kinds have settings that do not correspond: they are one difference, 'model', of the kinds.
    """
    old, new = flatten(resolved(then)), flatten(resolved(now))
    if then.model.kind != now.model.kind:
        old, new = (
            {MODEL: settings[f"{MODEL}.kind"]} | {name: value for name, value in settings.items() if not belongs(name, (MODEL,))}
            for settings in (old, new)
        )
    return [(name, old.get(name), new.get(name)) for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]


def describe_changes(changes: list[Change]) -> str:
    """'schedule.steps 300 → 600, parallel.tensor 1 → 2'."""
    return ", ".join(f"{name} {shown(name, then)} → {shown(name, now)}" for name, then, now in changes)


def shown(name: str, value: Any) -> Any:
    """The value as a sentence shows it: texts and examples in words, whether they are settings or read from config.json."""
    if name == EXAMPLES and isinstance(value, dict):
        return describe_examples(check_examples(value))
    if name != TRAIN or isinstance(value, str):
        return value
    return describe_texts([Source(**entry) if isinstance(entry, dict) else entry for entry in value])


def belongs(name: str, groups: Iterable[str]) -> bool:
    """Whether the dotted name is one of `groups`, or a setting in one of these groups."""
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name: {"model.num_layers": 4, …}. A list, an empty table, or the object of data.examples is a value."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value and f"{prefix}{name}" != EXAMPLES:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
