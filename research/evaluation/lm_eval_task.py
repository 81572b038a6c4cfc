"""lm-evaluation-harness' tasks as tasks of ours: `lm_eval:NAME`, from its own set or a local folder, without a network."""
# MERGED-DOC """Keeps the libraries of lm-evaluation-harness off the network and out of the user's home: they are told so by the environment only."""

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.errors import Mistake
from research.evaluation.task import Metric, Settings, TaskContext

OFFLINE = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def keep_offline(cache: Path) -> None:
    """Before `datasets` is imported. Local files are converted in `cache`; a cache that the user has named stays."""
    for name in OFFLINE:
        os.environ.setdefault(name, "1")
    os.environ.setdefault("HF_DATASETS_CACHE", str(cache))
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap forks a process that has threads and perhaps a GPU
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


if TYPE_CHECKING:
    from research.evaluation.session import Session

PREFIX = "lm_eval:"
PACKAGE = "lm_eval"
BOOTSTRAPS = 1000
"""Draws for the standard errors that have no closed form."""


@dataclass(frozen=True)
class LMEvalTask:
    """One of its tasks, groups or tags."""

    name: str
    chosen: Settings
    folder: Path | None
    """Where YAML files of the user's are, beside the harness' own tasks."""
    fewshot: int | None

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the figures, the harness' version included."""
        return {"limit": self.chosen.limit, "fewshot": self.fewshot, PACKAGE: importlib.metadata.version(PACKAGE)}

    def digest(self, given: TaskContext) -> str:
        """Of the folder's files, names included. The harness' own data have none: their version is in the settings."""
        found = hashlib.sha256()
        for path in sorted(path for path in (self.folder.rglob("*") if self.folder else ()) if path.is_file()):
            found.update(f"{path.relative_to(self.folder or path)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
        return found.hexdigest()

    def evaluated(self, session: "Session", cache: Path, progress: Callable[[int], object]) -> tuple[list[Metric], int]:
        """(its metrics, its examples)."""
        keep_offline(cache)
        logging.getLogger(PACKAGE).setLevel(logging.ERROR)
        from lm_eval import simple_evaluate

        from research.evaluation.lm_eval_model import OurModel

        name = self.name.removeprefix(PREFIX)
        told = simple_evaluate(
            OurModel(session, progress),
            tasks=[name],
            num_fewshot=self.fewshot,
            limit=self.chosen.limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
            task_manager=self._manager(name),
        )
        assert told is not None
        examples = sum(count["effective"] for count in told["n-samples"].values())
        return metrics(told["results"], told["higher_is_better"], name), examples

    def _manager(self, name: str) -> Any:
        """The folder's tasks alone where it has the name: the harness' own are thousands of files."""
        from lm_eval.tasks import TaskManager

        own = TaskManager(include_path=str(self.folder), include_defaults=False) if self.folder else None
        if own is not None and name in own.all_tasks:
            return own
        every = TaskManager(include_path=str(self.folder) if self.folder else None)
        if name not in every.all_tasks:
            raise Mistake(
                f"lm-evaluation-harness has no task {name!r} → see `lm-eval ls tasks`, or --lm_eval_tasks FOLDER with its YAML file"
            )
        return every


def metrics(results: Mapping[str, Mapping[str, Any]], higher: Mapping[str, Mapping[str, bool]], asked: str) -> list[Metric]:
    """Of the harness' table; those of a group's members as MEMBER/metric. Its filters are named where they are not 'none'."""
    found = []
    for task, row in results.items():
        for key, value in row.items():
            name, comma, kind = key.partition(",")
            if comma and not name.endswith("_stderr") and isinstance(value, int | float):
                stderr = row.get(f"{name}_stderr,{kind}")
                label = "/".join([*([task] if task != asked else []), name, *([kind] if kind != "none" else [])])
                error = float(stderr) if isinstance(stderr, int | float) else None
                found.append(Metric(label, float(value), error, bool(higher.get(task, {}).get(name))))
    return found


def named(name: str, settings: Settings, folder: Path | None, fewshot: int | None) -> LMEvalTask:
    """A Mistake where the harness is not installed or the folder is not there."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise Mistake(f"{name} needs lm-evaluation-harness, which is not installed → pip install -r requirements-eval.txt")
    if folder is not None and not folder.is_dir():
        raise Mistake(f"--lm_eval_tasks {folder} is not a folder → name one with the tasks' YAML files")
    return LMEvalTask(name, settings, folder, fewshot)
