"""What may differ between a run's saved settings and today's when it goes on: nothing that its steps so far were computed with."""

from typing import Any

from research.config.schema import Experiment
from research.config.serialization import resolved

MOST = 8
"""Differences that are listed in one sentence."""

Change = tuple[str, Any, Any]
"""(dotted name, then, now)."""


def diff(then: Experiment, now: Experiment) -> list[Change]:
    """Every setting that differs, by dotted name, in the order of the schema."""
    old, new = flattened(resolved(then)), flattened(resolved(now))
    return [(name, old.get(name), new.get(name)) for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]


def describe_changes(found: list[Change]) -> str:
    """'schedule.steps 300 → 600, parallel.tensor 1 → 2'."""
    return ", ".join(f"{name} {then} → {now}" for name, then, now in found)


def flattened(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by dotted name: {"model.num_layers": 4, …}; a list is a value."""
    if not isinstance(value, dict) or (not value and name):
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flattened(inner, f"{name}.{key}" if name else key)
    return found
