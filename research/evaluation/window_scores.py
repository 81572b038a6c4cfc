"""What a checkpoint's model gives each window of its run's held-out text, kept in RUN/evaluations/windows/step_N.json. For `compare`.

```
{"schema": 1, "key": {"manifest_sha256": "…", "windows_sha256": "…", "model_sha256": "…", "code_sha256": "…"},
 "nats": [812.3, …], "tokens": [128, …]}
```
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.config import GPT
from parallel.checkpoint.folder import MANIFEST
from parallel.errors import Mistake
from parallel.files import read_json, sha256_of, write_json
from research.evaluation import statistics
from research.evaluation.results import FOLDER, code_digest, model_digest
from research.evaluation.scorer import Scorer, ScoreRequest
from research.evaluation.task import score_in_batches
from research.tracking import run_folder
from research.tracking.run_folder import RunFolder

SCHEMA = 1
WINDOWS = "windows"


@dataclass(frozen=True)
class WindowScores:
    """Of each window: the nats of its predicted tokens together, and how many these are."""

    windows_sha256: str
    """Of the tokens of all windows: equal if and only if the windows are."""
    nats: tuple[float, ...]
    tokens: tuple[int, ...]


def digest(windows: Sequence[ScoreRequest]) -> str:
    """SHA-256 of the windows' tokens and of which of them are predicted."""
    return hashlib.sha256("\n".join(f"{window.scored} {window.ids}" for window in windows).encode()).hexdigest()


def of_checkpoint(
    folder: RunFolder,
    checkpoint: Path,
    model: GPT,
    windows: Sequence[ScoreRequest],
    scorer: Callable[[], Scorer],
    progress: Callable[[int], object] = lambda n: None,
) -> WindowScores:
    """The scores that are kept, or those that `scorer()` gives, which are kept from then on."""
    path = folder.path / FOLDER / WINDOWS / f"{checkpoint.name}.json"
    for place in (path.parent.parent, path.parent):
        run_folder.refuse_link(place)
    key = {
        "manifest_sha256": sha256_of(checkpoint / MANIFEST),
        "windows_sha256": digest(windows),
        "model_sha256": model_digest(folder, model),
        "code_sha256": code_digest(),
    }
    counts = tuple(window.scored for window in windows)
    if (known := _kept(path, key)) and known.tokens == counts and len(known.nats) == len(counts):
        return known
    scores = score_in_batches(windows, scorer(), progress)
    found = WindowScores(key["windows_sha256"], tuple(-score.logprob for score in scores), counts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"schema": SCHEMA, "key": key, "nats": [*found.nats], "tokens": [*found.tokens]})
    return found


def _kept(path: Path, key: dict[str, str]) -> WindowScores | None:
    """What the file says; None if there is none, or it is of something else or damaged: then it is replaced."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = read_json(path)
        if kept["schema"] == SCHEMA and kept["key"] == key:
            return WindowScores(key["windows_sha256"], tuple(map(float, kept["nats"])), tuple(map(int, kept["tokens"])))
    return None


def stderr_of_difference(baseline: Sequence[WindowScores], variant: Sequence[WindowScores]) -> float | None:
    """The standard error of the difference in nats per token, variant − baseline, over windows that count as independent.

    The scores of each side are of the same windows, one for each seed: their mean over seeds is taken first, window by window. None for
    one window. A Mistake if the windows are not the same.
    """
    if len({scores.windows_sha256 for scores in (*baseline, *variant)}) > 1:
        raise Mistake(
            "the runs read the held-out text in windows that are not the same, by another tokenizer, model.seq_length or text → "
            "compare them without --windows"
        )
    means = [[statistics.mean(nats) for nats in zip(*(scores.nats for scores in side), strict=True)] for side in (baseline, variant)]
    tokens = [float(count) for count in baseline[0].tokens]
    return statistics.of_ratio([b - a for a, b in zip(*means, strict=True)], tokens)
