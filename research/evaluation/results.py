"""The results file of a checkpoint, RUN/evaluations/step_000270.json, which is replaced as a whole after every task.

```
{"schema": 1, "run": "gpt_sotu-6583c1", "checkpoint": "step_000270", "manifest_sha256": "…",
 "results": [{"task": "lambada", "settings": {"limit": null}, "data_sha256": "…", "tokenizer_sha256": "…", "precision": "fp32",
              "tensor": 2, "batch": 8, "examples": 5153, "seconds": 61.2, "ended": "2026-01-31T12:00:00+00:00",
              "metrics": {"accuracy": {"value": 0.45, "stderr": 0.007, "higher_is_better": true}, …}}, …]}
```
Two results are of the same task if task, settings, data, tokenizer and precision are equal. The layout is recorded but changes nothing.
Numbers that are not finite are the strings "nan", "inf" and "-inf".
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parallel.checkpoint.folder import MANIFEST
from parallel.errors import Mistake
from parallel.files import read_json, write_json
from research.evaluation.task import Metric
from research.tracking.metrics import finite
from research.tracking.run_folder import RunFolder

SCHEMA = 1
FOLDER = "evaluations"


@dataclass(frozen=True)
class Key:
    """What determines the metrics of a task on a checkpoint."""

    task: str
    settings: dict[str, Any]
    data_sha256: str
    tokenizer_sha256: str
    precision: str


@dataclass(frozen=True)
class Result:
    """The metrics of one task, and how they were computed."""

    key: Key
    metrics: tuple[Metric, ...]
    examples: int
    seconds: float
    tensor: int
    batch: int
    ended: str

    def row(self) -> dict[str, Any]:
        """The result as JSON data."""
        how = {name: getattr(self, name) for name in ("tensor", "batch", "examples", "seconds", "ended")}
        metrics = {
            metric.name: {"value": metric.value, "stderr": metric.stderr, "higher_is_better": metric.higher_is_better}
            for metric in self.metrics
        }
        return finite({**asdict(self.key), **how, "metrics": metrics})


def _result(row: dict[str, Any]) -> Result:
    """The inverse of Result.row."""
    how = {name: row[name] for name in ("examples", "seconds", "tensor", "batch", "ended")}
    key = Key(**{name: row[name] for name in Key.__dataclass_fields__})
    metrics = tuple(
        Metric(name, float(one["value"]), None if one["stderr"] is None else float(one["stderr"]), one["higher_is_better"])
        for name, one in row["metrics"].items()
    )
    return Result(key, metrics, **how)


def every(folder: RunFolder) -> list[Result]:
    """The results of all checkpoints of a run, also of those that have been deleted since; of the oldest checkpoint first."""
    found = []
    for path in sorted((folder.path / FOLDER).glob("step_*.json"), key=lambda path: (len(path.name), path.name)):
        try:
            found += [_result(row) for row in read_json(path)["results"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Mistake(f"{path} is not what an evaluation writes ({type(error).__name__}: {error}) → move it away") from error
    return found


class Results:
    """The results of one checkpoint. Not for two processes at once: the last one to write wins."""

    def __init__(self, folder: RunFolder, checkpoint: Path) -> None:
        """Reads the file if it exists, but not results of another checkpoint of the same step that has been replaced since."""
        self.path = folder.path / FOLDER / f"{checkpoint.name}.json"
        manifest = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
        self._head = {"schema": SCHEMA, "run": folder.title, "checkpoint": checkpoint.name, "manifest_sha256": manifest}
        self.results: list[Result] = []
        """In the order in which they were first computed."""
        if not self.path.is_file():
            return
        try:
            saved = read_json(self.path)
            if saved["manifest_sha256"] == manifest and saved["schema"] == SCHEMA:
                self.results = [_result(row) for row in saved["results"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Mistake(f"{self.path} is not what an evaluation writes ({type(error).__name__}: {error}) → move it away") from error

    def of(self, key: Key) -> Result | None:
        """The result of this key; None if there is none."""
        return next((result for result in self.results if result.key == key), None)

    def add(self, result: Result) -> None:
        """Adds a result, in place of an older one of the same key, and writes the file."""
        places = [i for i, other in enumerate(self.results) if other.key == result.key]
        self.results[slice(places[0], places[0] + 1) if places else slice(len(self.results), None)] = [result]
        self.path.parent.mkdir(exist_ok=True)
        write_json(self.path, {**self._head, "results": [one.row() for one in self.results]})
