"""The results file of a checkpoint, RUN/evaluations/step_000270.json, which is replaced as a whole after every task.

```
{"schema": 2, "run": "gpt_sotu-6583c1", "checkpoint": "step_000270", "manifest_sha256": "…",
 "results": [{"task": "lambada", "settings": {"limit": null}, "data_sha256": "…", "tokenizer_sha256": "…", "model_sha256": "…",
              "code_sha256": "…", "precision": "fp32", "files": {}, "tensor": 2, "batch": 8, "examples": 5153, "seconds": 61.2,
              "ended": "2026-01-31T12:00:00+00:00",
              "metrics": {"accuracy": {"value": 0.45, "stderr": 0.007, "higher_is_better": true}, …}}, …]}
```
Two results are of the same task if everything in `Key` is equal. The layout is recorded but changes nothing. A result is known, and not
computed again, as long as the files that were opened for it beside its data, `files`, have not changed either. Schema 1 had neither
`files` nor the SHA-256 of model and code: its results stay in the file, and are not known.
Numbers that are not finite are the strings "nan", "inf" and "-inf".
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from models.encoder_config import AnyModel
from parallel.checkpoint.folder import MANIFEST
from parallel.errors import Mistake
from parallel.files import locked, read_json, sha256_of, write_json
from research.config.experiment_folder import VARIANTS, variant_names
from research.evaluation.task import Metric
from research.tracking import run_folder
from research.tracking.metrics import finite
from research.tracking.run_folder import RunFolder

SCHEMA = 2
FOLDER = "evaluations"


@dataclass(frozen=True)
class Key:
    """What determines the metrics of a task on a checkpoint."""

    task: str
    settings: dict[str, Any]
    data_sha256: str
    """Empty if it is not known what the task reads: its results are then never known."""
    tokenizer_sha256: str
    model_sha256: str
    """Of the model's settings and of the variant.py with its classes (`model_digest`)."""
    code_sha256: str
    """Of the code that defines tasks and metrics (`code_digest`)."""
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
    files: dict[str, str] = field(default_factory=dict)
    """Files that were opened beside the task's data -> SHA-256."""

    @property
    def is_current(self) -> bool:
        """Whether it is known what was read, and the other files have not changed since."""
        return bool(self.key.data_sha256) and all(_digest(Path(path)) == sha256 for path, sha256 in self.files.items())

    def row(self) -> dict[str, Any]:
        """The result as JSON data."""
        how = {name: getattr(self, name) for name in ("files", "tensor", "batch", "examples", "seconds", "ended")}
        metrics = {
            metric.name: {"value": metric.value, "stderr": metric.stderr, "higher_is_better": metric.higher_is_better}
            for metric in self.metrics
        }
        return finite({**asdict(self.key), **how, "metrics": metrics})


def _result(row: dict[str, Any]) -> Result:
    """The inverse of Result.row."""
    how = {name: row[name] for name in ("examples", "seconds", "tensor", "batch", "ended")}
    how["files"] = row.get("files", {})  # schema 1
    key = Key(**{"model_sha256": "", "code_sha256": ""} | {name: row[name] for name in Key.__dataclass_fields__ if name in row})
    metrics = tuple(
        Metric(name, float(one["value"]), None if one["stderr"] is None else float(one["stderr"]), one["higher_is_better"])
        for name, one in row["metrics"].items()
    )
    return Result(key, metrics, **how)


def every(folder: RunFolder) -> list[Result]:
    """The results of all checkpoints of a run, also of those that have been deleted since; of the oldest checkpoint first."""
    paths = sorted((folder.path / FOLDER).glob("step_*.json"), key=lambda path: (len(path.name), path.name))
    return [result for path in paths for result in _read_file(path)]


def of_checkpoint(folder: RunFolder, name: str) -> list[Result]:
    """The results of the checkpoint of this name, which may have been deleted since; none if it was not evaluated."""
    path = folder.path / FOLDER / f"{name}.json"
    return _read_file(path) if path.is_file() else []


def _read_file(path: Path) -> list[Result]:
    try:
        return [_result(row) for row in read_json(path)["results"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> Mistake:
    """The Mistake of a file that cannot be read as results. Of a Mistake it repeats what is wrong, but not the way out."""
    problem = str(error).partition(" → ")[0] if isinstance(error, Mistake) else f"{type(error).__name__}: {error}"
    return Mistake(f"{path} is not what an evaluation writes ({problem}) → move it away")


def with_digests(paths: Iterable[Path]) -> dict[str, str]:
    """Path -> SHA-256, in order of the paths, as in `Result.files`."""
    return {str(path): _digest(path) for path in sorted(paths)}


def _digest(path: Path) -> str:
    """The SHA-256 of a file; empty if it cannot be read."""
    try:
        return sha256_of(path)
    except OSError:
        return ""


def model_digest(folder: RunFolder, model: AnyModel) -> str:
    """SHA-256 of what a run's folder adds to the weights of its checkpoints: the model's settings, and variant.py if they name it."""
    settings = json.dumps(model.model_dump(), sort_keys=True)
    variants = _digest(folder.source / VARIANTS) if variant_names(model) else ""
    return hashlib.sha256(f"{settings}\0{variants}".encode()).hexdigest()


def code_digest() -> str:
    """SHA-256 of the files of this room: how tasks ask, and how their metrics are computed."""
    return hashlib.sha256("\0".join(with_digests(Path(__file__).parent.glob("*.py")).values()).encode()).hexdigest()


class Results:
    """The results of one checkpoint. Several processes may add theirs: the file is read again before it is written, under a lock.

    They do not hold the run's lock, so that a run can be evaluated while it trains: no other process writes into evaluations/.
    """

    def __init__(self, folder: RunFolder, checkpoint: Path) -> None:
        """Reads the file if it exists, but not results of another checkpoint of the same step that has been replaced since."""
        self.path = folder.path / FOLDER / f"{checkpoint.name}.json"
        run_folder.refuse_link(self.path.parent)
        manifest = sha256_of(checkpoint / MANIFEST)
        self._head = {"schema": SCHEMA, "run": folder.title, "checkpoint": checkpoint.name, "manifest_sha256": manifest}
        self.results: list[Result] = self._read()
        """In the order in which they were first computed."""

    def _read(self) -> list[Result]:
        if not self.path.is_file():
            return []
        try:
            saved = read_json(self.path)
            current = saved["manifest_sha256"] == self._head["manifest_sha256"] and saved["schema"] in (1, SCHEMA)
            return [_result(row) for row in saved["results"]] if current else []
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(self.path, error) from error

    def of(self, key: Key) -> Result | None:
        """The result of this key; None if there is none."""
        return next((result for result in self.results if result.key == key), None)

    def known(self, key: Key) -> bool:
        """Whether there is a result of this key that is still current."""
        result = self.of(key)
        return result is not None and result.is_current

    def add(self, result: Result) -> None:
        """Adds a result, in place of an older one of the same key, and writes the file."""
        self.path.parent.mkdir(exist_ok=True)
        with locked(self.path.parent / ".lock"):
            self.results = self._read()  # with what other processes have added since
            places = [i for i, other in enumerate(self.results) if other.key == result.key]
            self.results[slice(places[0], places[0] + 1) if places else slice(len(self.results), None)] = [result]
            write_json(self.path, {**self._head, "results": [one.row() for one in self.results]})
