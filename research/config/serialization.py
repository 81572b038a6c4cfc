"""TODO research.config.serialization."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from parallel.files import write_json
from research.config.schema import Experiment

SCHEMA = 5
"""The version of a saved config.json. A new or changed field raises it and adds a function to MIGRATIONS."""


def _without_dropout(settings: dict[str, Any]) -> dict[str, Any]:
    """1 → 2: models had no dropout. Sequence parallelism and recomputation, new too, are off unless set."""
    if not isinstance(model := settings.get("model"), dict):
        return settings  # what is missing is said when the settings are read
    return {**settings, "model": {f"{place}_dropout": 0.0 for place in ("embedding", "residual", "mlp", "attention")} | model}


def _unwatched(settings: dict[str, Any]) -> dict[str, Any]:
    """2 → 3: one checkpoint, at the end; DeepSpeed skipped what was not finite; nobody looked for hangs or spikes."""
    watch = {"hang_seconds": 0.0, "non_finite": "skip", "most_skips": 0, "spike": 0.0}
    return {"checkpoints": {"every": 0}, "watch": watch} | settings


def _unscaled(settings: dict[str, Any]) -> dict[str, Any]:
    """3 → 4: rotary positions had their own wavelengths; every run began with weights drawn from its seed."""
    if not isinstance(model := settings.get("model"), dict) or model.get("position") != "rotary":
        return settings
    return {**settings, "model": {"rotary_scaling": "none"} | model}


def _unasked(settings: dict[str, Any]) -> dict[str, Any]:
    """4 → 5: in the middle of training nothing was evaluated but the validation text, and nothing written."""
    return {"evaluate": {"every": 0}, "sample": {"every": 0}} | settings


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _without_dropout, 2: _unwatched, 3: _unscaled, 4: _unasked}
"""n -> the function that turns the settings of schema n into those of schema n + 1 with the old behaviour."""


def resolved(experiment: Experiment) -> dict[str, Any]:
    """The whole experiment as JSON data, headed by its schema number."""
    return {"schema": SCHEMA, **experiment.model_dump(mode="json")}


def build(settings: dict[str, Any]) -> Experiment:
    """The experiment with these settings, groups given as dicts: what `resolved` returned, less `schema`."""
    return Experiment(**settings)


def save(experiment: Experiment, path: Path) -> None:
    """Write config.json in one stroke: a reader finds the old file, the new one or none, never half of one."""
    write_json(path, resolved(experiment))


def load(path: Path) -> Experiment:
    """Read a saved config.json of this schema or an older one. It is data, trusted with nothing."""
    settings = _read(path)
    schema = settings.pop("schema", None)
    if type(schema) is not int or schema < 1:
        raise Mistake(f"{path} has schema = {schema!r} → give it a config.json that a run has written")
    if schema > SCHEMA:
        raise Mistake(f"{path} has schema {schema}, this code reads up to {SCHEMA} → update the code to the version that wrote it")
    for version in range(schema, SCHEMA):
        settings = MIGRATIONS[version](settings)
    try:
        return build(settings)
    except Mistake as mistake:
        raise Mistake(f"{path}: {mistake}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror}) → name a run folder that holds config.json") from None
    except (ValueError, RecursionError) as error:
        raise Mistake(f"{path} is not JSON ({error}) → give it a config.json that a run has written") from None
    if not isinstance(settings, dict):
        raise Mistake(f"{path} holds a {type(settings).__name__} → give it a config.json that a run has written")
    return settings


def config_hash(experiment: Experiment) -> str:
    """SHA-256 of the resolved settings, 16 digits of it."""
    return hashlib.sha256(json.dumps(resolved(experiment), sort_keys=True).encode()).hexdigest()[:16]
