"""Refuses to compare a metric of two runs where it means nothing: other text, another tokenizer, other examples. Imports no torch."""

import math
from collections.abc import Sequence
from typing import Any

from parallel.errors import Mistake
from research.ablation.sides import FinishedRun
from research.config.sources import describe_texts

NATS = ("loss", "ppl", "perplexity")
"""Last words of metrics that count per token of the run's own tokenizer."""
MADE_FROM_TEXT = ("builtin:bpe-", "builtin:chars")
"""Beginnings of the names of tokenizers that are made from the training text."""
SPLIT = "split:"


def refuse_incomparable(a: FinishedRun, b: FinishedRun, metric: str) -> None:
    """Raises a Mistake if `metric` of the two runs is not of the same text, in the same unit."""
    group, *_, last = metric.split("/")
    if group not in ("val", "train", "eval"):
        return
    same_data = a.fingerprint is not None and a.fingerprint == b.fingerprint
    if group == "val":
        _refuse_other_held_out_text(a, b, metric, same_data)
    if group == "train" and last in NATS and not same_data:
        one, other = (describe_texts(run.experiment.data.train) for run in (a, b))
        _refuse_other(a, b, f"{metric} is of the training text", one, other, "a metric of one held-out text, val/…")
    if last in NATS and not same_data:
        _refuse_other(a, b, f"{metric} is per token", _tokenizer(a), _tokenizer(b), "--metric val/bits_per_byte")
    if group == "eval":
        for name in ("limit", "data"):
            one, other = (getattr(run.experiment.evaluate, name) for run in (a, b))
            _refuse_other(a, b, f"{metric} depends on evaluate.{name}", str(one), str(other), "runs with one value of it")


def _refuse_other(a: FinishedRun, b: FinishedRun, what: str, one: str, other: str, instead: str) -> None:
    if one != other:
        raise Mistake(f"{what}: {a.folder.title} has {one:.100}, {b.folder.title} has {other:.100} → compare {instead}")


def _refuse_other_held_out_text(a: FinishedRun, b: FinishedRun, metric: str, same_data: bool) -> None:
    """By name, by size in bytes, and by the fingerprints of the checkpoints."""
    instead = "runs with one held-out text"
    if not same_data:
        _refuse_other(a, b, f"{metric} is of the held-out text", _held_out(a), _held_out(b), instead)
    sizes = [_num_bytes(run.rows, metric) for run in (a, b)]
    if None not in sizes:
        limits = [run.experiment.schedule.validate_tokens for run in (a, b)]
        why = f" (schedule.validate_tokens = {limits[0]} and {limits[1]})" if any(limits) else ""
        _refuse_other(a, b, f"{metric} is of the held-out text{why}", f"{sizes[0]:,} bytes of it", f"{sizes[1]:,} bytes of it", instead)
    named = [(describe_texts(run.experiment.data.train), _tokenizer(run)) for run in (a, b)]
    if not same_data and a.fingerprint and b.fingerprint and named[0] == named[1]:
        prints = [f"the fingerprint {fingerprint[:16]}" for fingerprint in (a.fingerprint, b.fingerprint)]
        _refuse_other(a, b, "a file of the data has changed between the runs", prints[0], prints[1], instead)


def _held_out(run: FinishedRun) -> str:
    """The name of the held-out text; of a split, with that of the text it is a part of."""
    data = run.experiment.data
    return f"{data.validation} of {describe_texts(data.train)}" if data.validation.startswith(SPLIT) else data.validation


def _tokenizer(run: FinishedRun) -> str:
    """The name of the tokenizer; if it is made from the training text, with that text's name."""
    data = run.experiment.data
    made = data.tokenizer.startswith(MADE_FROM_TEXT)
    return f"the tokenizer {data.tokenizer}" + (f" of {describe_texts(data.train)}" if made else "")


def _num_bytes(rows: Sequence[dict[str, Any]], metric: str) -> int | None:
    """The bytes of the held-out text, from the two units of one validation: nats = loss · tokens = bits_per_byte · bytes · ln 2."""
    group = metric.rpartition("/")[0]
    keys = tuple(f"{group}/{name}" for name in ("loss", "tokens", "bits_per_byte"))
    for row in rows:
        values = [row.get(key) for key in keys]
        if all(isinstance(value, (int, float)) and math.isfinite(value) and value > 0 for value in values):
            loss, tokens, bits = values
            size = loss * tokens / (bits * math.log(2))  # type: ignore[operator]
            return round(size) if math.isfinite(size) else None
    return None
