"""Resuming: the run and the checkpoint that `--resume` names, or `init_from`, and whether today's settings allow it.

Everything here is decided before torch is imported.
"""

import hashlib
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.folder import MANIFEST
from parallel.checkpoint.manifest import MAX_BYTES, parse
from parallel.errors import Mistake, listed
from parallel.files import read_json
from research.config import Experiment, serialization
from research.config.diff import MOST, Change, describe_changes, diff
from research.config.experiment_folder import VARIANTS, variant_names
from research.data.prepare import same_tokenizer
from research.tracking import run_folder
from research.tracking.run_folder import FINISHED, IMPORTED, RUNNING, RunFolder
from research.training.schedule import learning_rate

AUTO, NEVER = "auto", "never"
MAY_CHANGE = (
    "schema",
    "question",
    "parent",
    "schedule.steps",
    "schedule.micro_batch_size",
    "schedule.validate_every",
    "schedule.validate_tokens",
    "schedule.log_every",
    "data.cache",
    "parallel",
    "precision",
    "checkpoints",
    "watch",
    "evaluate",
    "sample",
    "track",
    "deepspeed",
)
"""Settings, or groups of them, that may change on resume because the run stays the same experiment."""
RECORDED = {
    "schedule.validate_every": "validations",
    "schedule.validate_tokens": "validations",
    "schedule.log_every": "rows of metrics.jsonl",
    "evaluate": "evaluations",
    "sample": "samples",
    "watch": "checks of each step",
}
"""Settings that change no step, but what is recorded of it or what an anomaly leads to -> what they change."""


def allowed(then: Experiment, now: Experiment, run: str) -> list[Change]:
    """The changes between two sets of settings. Raises a Mistake that lists those that are not in MAY_CHANGE."""
    changes = diff(then, now)
    refused = [change for change in changes if not _is_of(change[0], MAY_CHANGE)]
    if refused:
        more = f" and {len(refused) - MOST} more" if len(refused) > MOST else ""
        raise Mistake(
            f"{run} cannot go on with {describe_changes(refused[:MOST])}{more}: its steps so far were taken with the old value → "
            "put it back, or begin a run of its own (without --resume), in a copy of the experiment's folder"
        )
    return [change for change in changes if change[0] != "schema"]


def continuation(
    step: int, changes: Sequence[Change], now: Experiment, differences: Mapping[str, tuple[Any, Any]], same_code: bool, device: str
) -> str:
    """How far a run that resumes at `step` is the run that was never stopped, in words that say no more than is true.

    `changes` are the settings that differ, `differences` those of layout and machine (parallel/engines/process_state.py).
    'bit for bit as if it had never stopped' needs that nothing differs, and a CPU: some GPU kernels add in no fixed order.
    """
    rounding = [f"{name.partition('.')[2]} {then} → {to}" for name, (then, to) in differences.items()]
    rounding += ["other DeepSpeed settings"] * any(_is_of(name, ["deepspeed"]) for name, _, _ in changes)
    rounding += ["GPU kernels"] * (device != "cpu")
    exact = f"within rounding ({', '.join(rounding)})" if rounding else "bit for bit"

    then, to = next(((then, to) for name, then, to in changes if name == "schedule.steps"), (now.schedule.steps,) * 2)
    if not _same_rates(now, then, to, range(step)):
        said = f"same state, other learning rates from here on ({now.optimizer.decay} over {to} steps, not {then})"
        said += f", {exact}" if rounding else ""
    elif not _same_rates(now, then, to, range(step, min(then, to))):
        said = f"{exact} as if it had been begun with {to} steps"
    else:
        said = f"{exact} as if it had never stopped"

    other = dict.fromkeys(what for prefix, what in RECORDED.items() if any(_is_of(name, [prefix]) for name, _, _ in changes))
    said += f", with other {listed(other, 'and')}" if other else ""
    return said if same_code else f"{said}, if the code, which has changed, still computes the same"


def _same_rates(experiment: Experiment, then: int, to: int, steps: Iterable[int]) -> bool:
    """Whether a run of `then` and one of `to` steps have the same learning rate in each of `steps`."""
    optimizer = experiment.optimizer
    return then == to or all(learning_rate(step, optimizer, then) == learning_rate(step, optimizer, to) for step in steps)


def _is_of(name: str, prefixes: Iterable[str]) -> bool:
    """Whether the dotted name is one of `prefixes`, or a setting in such a group."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def init_from_path(experiment: Experiment, root: Path) -> Path | None:
    """The folder of the checkpoint that `init_from` names, relative to `root`; None if weights are drawn."""
    return None if experiment.init_from is None else Path(root) / Path(experiment.init_from).expanduser()


def check_init_from(experiment: Experiment, root: Path) -> None:
    """Raises a Mistake if `init_from` is set and names no checkpoint."""
    path = init_from_path(experiment, root)
    if path is None or (path / MANIFEST).is_file():
        return
    newest = checkpoint_folder.newest_complete(path / "checkpoints") if (path / "checkpoints").is_dir() else None
    such = f"{experiment.init_from}/checkpoints/{newest.name}" if newest else "runs/NAME/ID/checkpoints/step_N"
    raise Mistake(f"init_from = {experiment.init_from!r}: {path} is not a checkpoint, it has no {MANIFEST} → name {such}")


def doubts_of_init_from(experiment: Experiment, root: Path) -> Iterator[str]:
    """A warning if the weights that a run begins with know other tokens, as far as the folder of their run tells."""
    path, now = init_from_path(experiment, root), experiment.data
    config = path.parent.parent / "config.json" if path else None
    if config is None or not config.is_file():
        return
    then = serialization.load(config).data
    if not same_tokenizer(then, now, root):
        trained = f" trained on {then.train!r}, not on {now.train!r}" if then.tokenizer == now.tokenizer else f", not {now.tokenizer!r}"
        yield (
            f"init_from = {experiment.init_from!r}: its weights know the tokens of {then.tokenizer!r}{trained}, so that the ids mean "
            "other text → set data.tokenizer to the tokenizer.json that `python -m research export` writes for that run"
        )


def init_from_digest(experiment: Experiment, root: Path) -> str:
    """A digest of the manifest, which holds the digest of every file; 'drawn' without init_from, 'missing' if it is not on this host."""
    path = init_from_path(experiment, root)
    if path is None:
        return "drawn"
    return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()[:16] if (path / MANIFEST).is_file() else "missing"


@dataclass(frozen=True)
class Resume:
    """A run to resume, and the checkpoint to resume from."""

    folder: RunFolder
    checkpoint: Path
    facts: dict[str, Any]
    """What the checkpoint's manifest says of the run."""
    changed: list[Change]
    """The settings that differ from the saved ones, all of them in MAY_CHANGE."""

    @property
    def step(self) -> int:
        """Optimizer steps taken before the checkpoint."""
        return self.facts["step"]


def find(handle: str, experiment: Experiment, source: Path, runs: Path) -> Resume | None:
    """The run that `handle` (auto, never, a run, a checkpoint) names; None if a new run begins. Rank 0 only.

    `source` is the experiment's folder, `runs` the folder that holds NAME/ID/. Raises a Mistake if the run cannot be resumed.
    """
    if handle == NEVER:
        return None
    folder, checkpoint = _newest(runs, source.name) if handle == AUTO else run_folder.find_checkpoint(handle, runs)
    if folder is None or checkpoint is None:
        return None
    if folder.name != source.name:
        raise Mistake(
            f"{folder.title} is a run of {folder.name}, this is {source.name} → launch experiments/{folder.name} to go on with it"
        )
    run = read_json(folder.run)
    status = run_folder.status(run)
    if status == RUNNING and run.get("host") == socket.gethostname():
        raise Mistake(f"{folder.title} is running (process {run['pid']}) → wait for its end, or end it: kill -USR1 {run['pid']}")
    if status == IMPORTED:
        raise Mistake(f"{folder.title} was imported, not trained: it holds weights alone → leave --resume out: init_from begins with them")
    steps = experiment.schedule.steps
    if handle != AUTO and status == FINISHED and steps <= _facts(checkpoint)["step"]:
        raise Mistake(
            f"{folder.title} has taken all of its {steps} steps → add --schedule.steps {2 * steps} to go on, or leave --resume out"
        )
    _refuse_other_variant(folder, source, experiment)
    return Resume(folder, checkpoint, _facts(checkpoint), allowed(serialization.load(folder.config), experiment, folder.title))


def _newest(runs: Path, name: str) -> tuple[RunFolder | None, Path | None]:
    """The newest run of the experiment that has a checkpoint, and its newest checkpoint; (None, None) if that run is finished."""
    candidates = [(read_json(folder.run), folder) for folder in run_folder.every(runs) if folder.name == name]
    for run, folder in sorted(candidates, key=lambda pair: str(pair[0].get("started")), reverse=True):
        if checkpoint_folder.newest_complete(folder.checkpoints) is None or run_folder.status(run) == IMPORTED:
            continue
        if run_folder.status(run) == FINISHED:
            return None, None
        return folder, checkpoint_folder.latest(folder.checkpoints)
    return None, None


def _facts(checkpoint: Path) -> dict[str, Any]:
    """What the manifest says without its tables. The file may come from a stranger."""
    path = checkpoint / MANIFEST
    try:
        with path.open("rb") as file:
            return parse(file.read(MAX_BYTES)).facts
    except (OSError, ValueError) as error:
        raise Mistake(f"{path} is not the manifest of a checkpoint: {error} → use another checkpoint of the run") from None


def _refuse_other_variant(folder: RunFolder, source: Path, experiment: Experiment) -> None:
    """Raises a Mistake if variant.py has changed: a changed class is a changed model, which no setting shows."""
    if not variant_names(experiment.model):
        return
    paths = folder.source / VARIANTS, source / VARIANTS
    then, now = (hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing" for path in paths)
    if then != now:
        raise Mistake(
            f"{source / VARIANTS} is not what {folder.title} was trained with (SHA-256 {then[:12]} → {now[:12]}) → "
            f"put {folder.source / VARIANTS} back, or begin a run of its own"
        )
