"""What may differ between a run's saved settings and today's when it goes on: nothing that its steps so far were computed with."""

from typing import Any

from parallel.errors import Mistake
from research.config import Experiment, resolved

MAY_CHANGE = (
    "schema",
    "question",
    "parent",
    "schedule.steps",
    "schedule.micro_batch_size",
    "schedule.validate_every",
    "schedule.log_every",
    "data.cache",
    "parallel",
    "precision",
    "checkpoints",
    "watch",
    "evaluate",
    "sample",
    "track",
    "deepspeed",
)
"""Settings, or groups of them, that leave the run the same experiment: how long, how often, where, on which layout, how precisely."""
MOST = 8
"""Differences that are listed in one sentence."""

Change = tuple[str, Any, Any]
"""(dotted name, then, now)."""


def changes(then: Experiment, now: Experiment) -> list[Change]:
    """Every setting that differs, by dotted name, in the order of the schema."""
    old, new = _flat(resolved(then)), _flat(resolved(now))
    return [(name, old.get(name), new.get(name)) for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]


def allowed(then: Experiment, now: Experiment, run: str) -> list[Change]:
    """What differs, all of it harmless; a Mistake that lists what is not."""
    found = changes(then, now)
    refused = [change for change in found if not _may_change(change[0])]
    if refused:
        more = f" and {len(refused) - MOST} more" if len(refused) > MOST else ""
        raise Mistake(
            f"{run} cannot go on with {said(refused[:MOST])}{more}: its steps so far were taken with the old value → "
            "put it back, or begin a run of its own (without --resume), in a copy of the experiment's folder"
        )
    return [change for change in found if change[0] != "schema"]


def said(found: list[Change]) -> str:
    """'schedule.steps 300 → 600, parallel.tensor 1 → 2'."""
    return ", ".join(f"{name} {then} → {now}" for name, then, now in found)


def _may_change(name: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in MAY_CHANGE)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"model.num_layers": 4, …}; a list is a value."""
    if not isinstance(value, dict) or (not value and name):
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{name}.{key}" if name else key)
    return found
