"""One run on one rank, resolved: what the part before torch hands to the part after it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research.config import Experiment
from research.layout import Layout
from research.machine import Ranks

if TYPE_CHECKING:
    from research.resume import Resume

Override = tuple[str, Any, Any]
"""(dotted setting, value in the file, value on the command line)."""


@dataclass(frozen=True)
class Job:
    """An experiment, where it lies, how it was changed, who runs it."""

    experiment: Experiment
    folder: Path
    name: str
    overrides: list[Override]
    ranks: Ranks
    layout: Layout
    root: Path
    verbose: bool
    argv: list[str]
    resume: "Resume | None" = None
    """The run that goes on, as rank 0 found it; None on the other ranks."""
