"""Steps that went wrong, described so that they can be run again: `incidents/step_000123.json` in the run's folder."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from parallel import checkpoint_folder
from parallel.errors import Mistake
from research.metrics import finite
from research.run_folder import RunFolder, read_json, write_json

NON_FINITE, SPIKE = "non_finite", "spike"


@dataclass(frozen=True)
class Suspect:
    """A rank whose own gradients were not finite, and of which parameters."""

    rank: int
    place: str
    parameters: list[str]


@dataclass(frozen=True)
class Incident:
    """One step, counted from 1 as in the rows: what happened, on which samples, from which checkpoint it can be reached again."""

    step: int
    kind: str
    loss: float | str
    grad_norm: float | str
    samples: tuple[int, int]
    """The run's sample numbers, first and last + 1."""
    windows: list[int]
    """Where they lie in the training text: window i begins at token i · seq_length."""
    checkpoint: str | None
    """The newest one at or before the step's beginning."""
    suspects: list[Suspect] = field(default_factory=list)

    @property
    def said(self) -> str:
        """'step 12: the loss is nan; rank 1 (data 1): blocks.0.attention.qkv.weight and 3 more'."""
        what = f"the loss is {self.loss}" if self.kind == SPIKE or isinstance(self.loss, str) else f"the gradient norm is {self.grad_norm}"
        who = [f"rank {s.rank} ({s.place}): {s.parameters[0]}{_more(s.parameters)}" for s in self.suspects]
        return "; ".join([f"step {self.step}: {what}", *who])


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def path_of(folder: RunFolder, step: int) -> Path:
    """Where a step's description lies."""
    return folder.incidents / f"step_{step:06d}.json"


def keep(folder: RunFolder, incident: Incident) -> None:
    """Writes it down. Rank 0 only."""
    folder.incidents.mkdir(exist_ok=True)
    write_json(path_of(folder, incident.step), finite(asdict(incident)))


def newest_before(folder: RunFolder, step: int) -> str | None:
    """The newest complete checkpoint of at most `step` steps."""
    found = [path for path in checkpoint_folder.steps(folder.checkpoints) if int(path.name.removeprefix("step_")) <= step]
    return found[-1].name if found else None


def load(folder: RunFolder, step: int) -> Incident:
    """The description of a step. It is data and may be hostile."""
    path = path_of(folder, step)
    known = sorted(int(p.stem.removeprefix("step_")) for p in folder.incidents.glob("step_*.json")) if folder.incidents.is_dir() else []
    if not path.is_file():
        there = f"there are incidents at {', '.join(map(str, known[:8]))}" if known else "the run had no incident"
        raise Mistake(f"{folder.title} has no incident at step {step} → {there}")
    try:
        told: dict[str, Any] = read_json(path)
        suspects = [Suspect(**suspect) for suspect in told.pop("suspects")]
        first, last = told.pop("samples")
        return Incident(**told, samples=(int(first), int(last)), suspects=suspects)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Mistake(f"{path} does not describe a step ({error}) → use what a run has written") from None
