"""What an offline W&B run is written again from, where the first one broke: the run folder's own files."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from research import metrics
from research.run_folder import RunFolder

STEP, TOKENS, OFFLINE = "progress/step", "progress/tokens", "offline-run-*"
TEXTS = ("prompt", "text", "finish")


def sample_row(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A row of samples.jsonl as W&B gets it: 'prompt', 'text' and 'finish' are 'sample/prompt', 'sample/text' and 'sample/finish'."""
    return {f"sample/{key}" if key in TEXTS else key: value for key, value in sample.items()}


def table_row(sample: Mapping[str, Any]) -> list[Any]:
    """The same as a row of the table: step, tokens, prompt, text, finish (none in a row of an older run)."""
    return [sample.get(key) for key in (STEP, TOKENS, *TEXTS)]


def rows(folder: RunFolder, after: int = 0) -> list[dict[str, Any]]:
    """Every row later than step `after` that W&B was or should have been given, in order: by step, a step's samples after its metrics."""
    samples = [sample_row(sample) for sample in metrics.read(folder.samples)]
    return sorted((row for row in [*metrics.read(folder.metrics), *samples] if row[STEP] > after), key=lambda row: row[STEP])


@contextmanager
def replacing(broken: Path) -> Iterator[None]:
    """Puts the offline run folder `broken` aside while the block writes another beside it, and removes it after that.

    If the block raises, what it wrote goes and `broken` is back: part of the rows is better than none.
    """
    aside = broken.with_name(f".{broken.name}")  # its name holds the second it was made in, the other's may be the same
    broken.rename(aside)
    others = set(broken.parent.glob(OFFLINE))
    try:
        yield
    except BaseException:
        for half in set(broken.parent.glob(OFFLINE)) - others:
            shutil.rmtree(half, ignore_errors=True)
        aside.rename(broken)
        raise
    shutil.rmtree(aside, ignore_errors=True)
