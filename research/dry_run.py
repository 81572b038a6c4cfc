"""What --dry-run prints: the job in words, then every setting as it would be saved. Pure."""

import shlex
from collections.abc import Iterator
from typing import Any

from research.config import resolved
from research.describe import compact, describe, plural
from research.job import Job


def dry_run(job: Job, commit: str, dirty: bool) -> str:
    """The whole text, lines of 'label    text'."""
    tree = f"{commit} ({'changed' if dirty else 'clean'})" if commit != "unknown" else "no commit"
    lines = [f"{job.name} · dry run · {tree}"]
    lines += [f"{label:<9}{text}" for label, text in [*describe(job), *_more(job)]]
    width = max(len(name) for name, _ in _flat(resolved(job.experiment)))
    lines += ["", *(f"{name:<{width}}  {_written(value)}" for name, value in _flat(resolved(job.experiment)))]
    return "\n".join(lines) + "\n"


def _more(job: Job) -> list[tuple[str, str]]:
    experiment, layout = job.experiment, job.layout
    schedule, optimizer = experiment.schedule, experiment.optimizer
    tokens = compact(schedule.steps * layout.tokens_per_step)
    rate = f"lr {optimizer.lr:g}, {optimizer.decay}" + (f" to {optimizer.min_lr:g}" if optimizer.decay != "constant" else "")
    warmup = f" after {plural(optimizer.warmup_steps, 'warm-up step')}" if optimizer.warmup_steps else ""
    return [
        ("data", f"{experiment.data.train} · held out {experiment.data.validation} · {experiment.data.tokenizer}"),
        ("schedule", f"{plural(schedule.steps, 'step')} = {tokens} tokens · {rate}{warmup}"),
    ]


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _written(value: Any) -> str:
    return (shlex.join(map(str, value)) or "none") if isinstance(value, list) else str(value)
