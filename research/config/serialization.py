"""config.json of a run: an experiment as JSON data, saved, loaded and migrated from older schemas."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from parallel.files import write_json
from parallel.regular_files import read_table
from research.config.schema import Experiment

SCHEMA = 12
"""The version of a saved config.json. A new or changed field raises it and adds a function to MIGRATIONS."""
LARGEST = 2**20
"""The most bytes of a config.json; one has about 3,000."""


def resolved(experiment: Experiment) -> dict[str, Any]:
    """The whole experiment as JSON data, headed by its schema number."""
    return {"schema": SCHEMA, **experiment.model_dump(mode="json")}


def build(settings: dict[str, Any]) -> Experiment:
    """The experiment with these settings, groups given as dicts: the inverse of `resolved`, without `schema`."""
    return Experiment(**settings)


def config_hash(experiment: Experiment) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the resolved settings."""
    return hashlib.sha256(json.dumps(resolved(experiment), sort_keys=True).encode()).hexdigest()[:16]


def save(experiment: Experiment, path: Path) -> None:
    """Write config.json atomically: a reader finds the old file, the new one or none, never a part of one."""
    write_json(path, resolved(experiment))


def load(path: Path) -> Experiment:
    """Read a saved config.json of this schema or an older one. The file is data: nothing in it is executed."""
    try:
        settings = read_table(path, "give it a config.json that a run has written", LARGEST)
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror}) → name a run folder that holds config.json") from None
    return migrated(settings, path)


def migrated(settings: dict[str, Any], path: Path) -> Experiment:
    """The experiment of JSON data of this schema or an older one, as `resolved` has them. `path` is where the data come from."""
    settings = dict(settings)
    schema = settings.pop("schema", None)
    if type(schema) is not int or schema < 1:
        raise Mistake(f"{path} has schema = {schema!r:.60} → give it a config.json that a run has written")
    if schema > SCHEMA:
        raise Mistake(f"{path} has schema {schema}, this code reads up to {SCHEMA} → update the code to the version that wrote it")
    for version in range(schema, SCHEMA):
        settings = MIGRATIONS[version](settings)

    try:
        return build(settings)
    except Mistake as mistake:
        raise Mistake(f"{path}: {mistake}") from None


def _without_dropout(settings: dict[str, Any]) -> dict[str, Any]:
    """1 → 2: models had no dropout. Sequence parallelism and recomputation, also new, are off unless set."""
    if not isinstance(model := settings.get("model"), dict):
        return settings  # a missing group is reported when the settings are validated
    return {**settings, "model": {f"{place}_dropout": 0.0 for place in ("embedding", "residual", "mlp", "attention")} | model}


def _without_watch(settings: dict[str, Any]) -> dict[str, Any]:
    """2 → 3: a run saved one checkpoint, at the end; DeepSpeed skipped non-finite steps; hangs and spikes were not detected."""
    watch = {"hang_seconds": 0.0, "non_finite": "skip", "most_skips": 0, "spike": 0.0}
    return {"checkpoints": {"every": 0}, "watch": watch} | settings


def _without_rotary_scaling(settings: dict[str, Any]) -> dict[str, Any]:
    """3 → 4: rotary frequencies were not scaled; every run initialised its weights from its seed."""
    if not isinstance(model := settings.get("model"), dict) or model.get("position") != "rotary":
        return settings
    return {**settings, "model": {"rotary_scaling": "none"} | model}


def _without_periodic_tasks(settings: dict[str, Any]) -> dict[str, Any]:
    """4 → 5: during training only the validation loss was computed; no tasks were evaluated and no samples generated."""
    return {"evaluate": {"every": 0}, "sample": {"every": 0}} | settings


def _without_own_training(settings: dict[str, Any]) -> dict[str, Any]:
    """5 → 6: attention, loss and optimizer could not be chosen; a validation read all of the held-out text.

    Every head was hidden_size / num_heads wide, and the attention output had a bias as the MLP had: so it is where
    model.head_size and model.output_bias are not set.
    """
    added = {"model": {"attention": "softmax"}, "optimizer": {"name": "adamw"}, "schedule": {"validate_tokens": 0}}
    groups = {group: new | settings[group] for group, new in added.items() if isinstance(settings.get(group), dict)}
    return {"loss": "cross_entropy"} | settings | groups


def _without_profile(settings: dict[str, Any]) -> dict[str, Any]:
    """6 → 7: no steps were profiled, GPU kernels were not asked to be deterministic, and hang_seconds limited the wait for all ranks."""
    return {"deterministic": False} | settings


def _without_ramp(settings: dict[str, Any]) -> dict[str, Any]:
    """7 → 8: every step had batch_size sequences, as without schedule.batch_ramp."""
    return settings


def _without_sources(settings: dict[str, Any]) -> dict[str, Any]:
    """8 → 9: data.train was one text, and every sequence had seq_length tokens, as without schedule.length_ramp."""
    return settings


def _without_changes(settings: dict[str, Any]) -> dict[str, Any]:
    """9 → 10: an experiment did not declare what it changes."""
    return settings


def _without_examples(settings: dict[str, Any]) -> dict[str, Any]:
    """10 → 11: every sample was a window of the stream, as without data.examples."""
    return settings


def _without_kinds(settings: dict[str, Any]) -> dict[str, Any]:
    """11 → 12: every model was a GPT."""
    model = settings.get("model")
    return {**settings, "model": {"kind": "gpt"} | model} if isinstance(model, dict) else settings


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _without_dropout,
    2: _without_watch,
    3: _without_rotary_scaling,
    4: _without_periodic_tasks,
    5: _without_own_training,
    6: _without_profile,
    7: _without_ramp,
    8: _without_sources,
    9: _without_changes,
    10: _without_examples,
    11: _without_kinds,
}
"""n -> the function that turns the settings of schema n into those of schema n + 1 with the old behaviour."""
