"""Tasks of lm-evaluation-harness as `lm_eval:NAME`: its own tasks or YAML files of a local folder, without network access.

Imports neither lm_eval nor torch until a task is evaluated.
"""

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
from research.evaluation.examples import file_digest
from research.evaluation.lm_eval_files import TaskFiles, files_of, opened_by
from research.evaluation.task import Metric, Settings, TaskContext

if TYPE_CHECKING:
    from research.evaluation.session import Session

PREFIX = "lm_eval:"
PACKAGE = "lm_eval"
OFFLINE = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
BOOTSTRAP_ITERATIONS = 1000
"""For the standard errors that have no closed form."""


def keep_offline(cache: Path) -> None:
    """Sets the environment variables that keep lm_eval's libraries off the network and out of the home folder.

    They read them when they are imported, so call this before. Variables that the user has set are kept. `cache`: where `datasets`
    converts local files.
    """
    for name in OFFLINE:
        os.environ.setdefault(name, "1")
    os.environ.setdefault("HF_DATASETS_CACHE", str(cache))
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap forks a process that has threads and perhaps a GPU
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


@dataclass(frozen=True)
class LMEvalTask:
    """A task, group or tag of lm-evaluation-harness."""

    name: str
    options: Settings
    folder: Path | None
    """A folder of the user's YAML files, in addition to the harness' own tasks."""
    fewshot: int | None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the metrics, including the version of lm_eval."""
        return {"limit": self.options.limit, "fewshot": self.fewshot, PACKAGE: importlib.metadata.version(PACKAGE)}

    def digest(self, context: TaskContext) -> str:
        """SHA-256 of the files that the folder's tasks read, and of their names. Empty if that cannot be known, see TaskFiles.

        The harness' own data have no digest; the settings contain the version of the harness.
        """
        digest, files = hashlib.sha256(), self._files()
        for path in files.paths:
            inside = self.folder is not None and path.is_relative_to(self.folder.resolve())
            name = path.relative_to(self.folder.resolve()) if self.folder and inside else path
            digest.update(f"{name}\0{file_digest(path)}\0".encode())
        return digest.hexdigest() if files.complete else ""

    def evaluate(self, session: "Session", cache: Path, progress: Callable[[int], object]) -> tuple[list[Metric], int, set[Path]]:
        """Runs the harness' own evaluation on the session's model.

        Returns (metrics, number of examples, files that the tasks' Python helpers opened beside those of `digest`).
        """
        keep_offline(cache)
        logging.getLogger(PACKAGE).setLevel(logging.ERROR)
        from lm_eval import simple_evaluate

        from research.evaluation.lm_eval_model import LMEvalModel

        name, files = self.name.removeprefix(PREFIX), self._files().paths
        with opened_by(files) as opened:
            results = simple_evaluate(
                LMEvalModel(session, progress),
                tasks=[name],
                num_fewshot=self.fewshot,
                limit=self.options.limit,
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
                log_samples=False,
                task_manager=self._task_manager(name),
            )
        assert results is not None
        examples = sum(count["effective"] for count in results["n-samples"].values())
        return metrics_of(results["results"], results["higher_is_better"], name), examples, opened - set(files)

    def _files(self) -> TaskFiles:
        return files_of(self.folder) if self.folder else TaskFiles([], True)

    def _task_manager(self, name: str) -> Any:
        """Knows the folder's tasks only, if `name` is one of them: the harness' own tasks are thousands of files to read."""
        from lm_eval.tasks import TaskManager

        local = TaskManager(include_path=str(self.folder), include_defaults=False) if self.folder else None
        if local is not None and name in local.all_tasks:
            return local
        manager = TaskManager(include_path=str(self.folder) if self.folder else None)
        if name not in manager.all_tasks:
            raise Mistake(
                f"lm-evaluation-harness has no task {name!r} → see `lm-eval ls tasks`, or --lm_eval_tasks FOLDER with its YAML file"
            )
        return manager


def metrics_of(results: Mapping[str, Mapping[str, Any]], higher: Mapping[str, Mapping[str, bool]], name: str) -> list[Metric]:
    """The metrics in the harness' table of task `name`. Those of a group's members are named MEMBER/metric.

    A filter is part of the name unless it is 'none'.
    """
    metrics = []
    for task, row in results.items():
        for key, value in row.items():
            metric, comma, filter_name = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                stderr = row.get(f"{metric}_stderr,{filter_name}")
                label = "/".join([*([task] if task != name else []), metric, *([filter_name] if filter_name != "none" else [])])
                error = float(stderr) if isinstance(stderr, int | float) else None
                metrics.append(Metric(label, float(value), error, bool(higher.get(task, {}).get(metric))))
    return metrics


def create_task(name: str, settings: Settings, folder: Path | None, fewshot: int | None) -> LMEvalTask:
    """The task of this name. Raises a Mistake if lm_eval is not installed or `folder` does not exist."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise Mistake(f"{name} needs lm-evaluation-harness, which is not installed → pip install -r requirements-eval.txt")
    if folder is not None and not folder.is_dir():
        raise Mistake(f"--lm_eval_tasks {folder} is not a folder → name one with the tasks' YAML files")
    return LMEvalTask(name, settings, folder, fewshot)
