"""A task on one file of the user's: the part that all of them share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.evaluation import files
from research.evaluation.task import Given, Settings


@dataclass(frozen=True)
class FileTask:
    """All of research/evaluation/task.py's Task but `exam`."""

    name: str
    chosen: Settings
    path: Path

    @property
    def settings(self) -> dict[str, Any]:
        """How many examples."""
        return {"limit": self.chosen.limit}

    def digest(self, given: Given) -> str:
        """Of the file."""
        return files.digest(self.path)
