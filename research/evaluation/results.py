"""What evaluations have found: RUN/evaluations/step_000270.json, one file a checkpoint, replaced whole after every task.

```
{"schema": 1, "run": "gpt_sotu-6583c1", "checkpoint": "step_000270", "manifest_sha256": "…",
 "results": [{"task": "lambada", "settings": {"limit": null}, "data_sha256": "…", "tokenizer_sha256": "…", "precision": "fp32",
              "tensor": 2, "batch": 8, "examples": 5153, "seconds": 61.2, "ended": "2026-01-31T12:00:00+00:00",
              "metrics": {"accuracy": {"value": 0.45, "stderr": 0.007, "higher_is_better": true}, …}}, …]}
```
A task is the same one where task, settings, data, tokenizer and precision are; the layout is written down and changes nothing.
Figures that are not finite are the strings "nan", "inf" and "-inf".
"""

import hashlib
from collections.abc import Sequence
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
    """What decides the figures of a task on a checkpoint."""

    task: str
    settings: dict[str, Any]
    data_sha256: str
    tokenizer_sha256: str
    precision: str


@dataclass(frozen=True)
class Result:
    """One task's figures, and how they were come by."""

    key: Key
    metrics: tuple[Metric, ...]
    examples: int
    seconds: float
    tensor: int
    batch: int
    ended: str

    def row(self) -> dict[str, Any]:
        """As JSON data."""
        how = {name: getattr(self, name) for name in ("tensor", "batch", "examples", "seconds", "ended")}
        told = {one.name: {"value": one.value, "stderr": one.stderr, "higher_is_better": one.higher_is_better} for one in self.metrics}
        return finite({**asdict(self.key), **how, "metrics": told})


def _result(row: dict[str, Any]) -> Result:
    found = {name: row[name] for name in ("examples", "seconds", "tensor", "batch", "ended")}
    key = Key(**{name: row[name] for name in Key.__dataclass_fields__})
    metrics = (
        Metric(name, float(one["value"]), None if one["stderr"] is None else float(one["stderr"]), one["higher_is_better"])
        for name, one in row["metrics"].items()
    )
    return Result(key, tuple(metrics), **found)


class Results:
    """Those of one checkpoint. Not for two processes at once: the last to write wins."""

    def __init__(self, folder: RunFolder, checkpoint: Path) -> None:
        """Reads what is there; figures of another checkpoint of the same step, since replaced, are left out."""
        self.path = folder.path / FOLDER / f"{checkpoint.name}.json"
        manifest = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
        self._head = {"schema": SCHEMA, "run": folder.title, "checkpoint": checkpoint.name, "manifest_sha256": manifest}
        self._found: list[Result] = self._read() if self.path.is_file() else []

    def _read(self) -> list[Result]:
        try:
            told = read_json(self.path)
            same = told["manifest_sha256"] == self._head["manifest_sha256"] and told["schema"] == SCHEMA
            return [_result(row) for row in told["results"]] if same else []
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Mistake(f"{self.path} is not what an evaluation writes ({type(error).__name__}: {error}) → move it away") from error

    def of(self, key: Key) -> Result | None:
        """What was found before."""
        return next((one for one in self._found if one.key == key), None)

    def every(self) -> Sequence[Result]:
        """All, in the order in which they were first asked for."""
        return tuple(self._found)

    def add(self, result: Result) -> None:
        """Puts it in place of an older one of the same key, and writes the file."""
        places = [i for i, one in enumerate(self._found) if one.key == result.key]
        self._found[slice(places[0], places[0] + 1) if places else slice(len(self._found), None)] = [result]
        self.path.parent.mkdir(exist_ok=True)
        write_json(self.path, {**self._head, "results": [one.row() for one in self._found]})
