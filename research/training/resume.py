"""Resuming: the run and the checkpoint that `--resume` names, or `init_from`, and whether today's settings allow it.

Everything here is decided before torch is imported.
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from parallel.checkpoint import folder as checkpoint_folder
from parallel.checkpoint.folder import MANIFEST
from parallel.checkpoint.manifest import MAX_BYTES, parse
from parallel.errors import Mistake, listed
from parallel.files import read_json
from parallel.process_identity import ProcessIdentity
from research.config import Experiment, serialization
from research.config.diff import MOST, Change, belongs, describe_changes, diff
from research.config.experiment_folder import VARIANTS, variant_names
from research.config.schema import MEASURE
from research.data.prepare import same_tokenizer
from research.reliability.heartbeat import is_beating
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
    "profile",
    "deterministic",
    "evaluate",
    "sample",
    "track",
    "deepspeed",
)
"""Settings, or groups of them, that may change on resume because the run stays the same experiment."""
WATCH_SECONDS = 30.0
"""How long a run that cannot be seen is watched for a heartbeat, which its ranks write once per second."""
RECORDED = {
    "schedule.validate_every": "validations",
    "schedule.validate_tokens": "validations",
    "schedule.log_every": "rows of metrics.jsonl",
    "evaluate": "evaluations",
    "sample": "samples",
    "watch": "checks of each step",
}
"""Settings that change no step, but what is recorded of it or what an anomaly leads to -> what they change."""


def continuation(
    step: int,
    changes: Sequence[Change],
    now: Experiment,
    layout_and_machine: Mapping[str, tuple[Any, Any]],
    same_code: bool | None,
    device: str,
    variants: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """How far a run that resumes at `step` is the run that was never stopped, in words that say no more than is true.

    `changes` are the settings that differ, `layout_and_machine` what differs of these (parallel/engines/process_state.py).
    `same_code`: None if the checkpoint does not say with which code it was saved, as older ones do not.
    `variants`: what the experiment names of its variant.py, for a decay of its own.
    'bit for bit as if it had never stopped' needs that nothing differs, and a CPU or `deterministic`: some GPU kernels add in no fixed
    order. If `deterministic` was not set before, that is among `layout_and_machine`.
    """
    rounding = [f"{name.partition('.')[2]} {then} → {to}" for name, (then, to) in layout_and_machine.items()]
    rounding += ["other DeepSpeed settings"] * any(belongs(name, ["deepspeed"]) for name, _, _ in changes)
    rounding += ["GPU kernels"] * (device != "cpu" and not now.deterministic)
    exact = f"within rounding ({', '.join(rounding)})" if rounding else "bit for bit"

    then, to = next(((then, to) for name, then, to in changes if name == "schedule.steps"), (now.schedule.steps,) * 2)
    if not _same_rates(now, then, to, range(step), variants):
        said = f"same state, other learning rates from here on ({now.optimizer.decay} over {to} steps, not {then})"
        said += f", {exact}" if rounding else ""
    elif not _same_rates(now, then, to, range(step, min(then, to)), variants):
        said = f"{exact} as if it had been begun with {to} steps"
    else:
        said = f"{exact} as if it had never stopped"

    other = dict.fromkeys(what for prefix, what in RECORDED.items() if any(belongs(name, [prefix]) for name, _, _ in changes))
    said += f", with other {listed(other, 'and')}" if other else ""
    if same_code is None:
        return f"{said}, if the code is the one that saved it, which this checkpoint does not say"
    return said if same_code else f"{said}, if the code, which has changed, still computes the same"


def _same_rates(experiment: Experiment, then: int, to: int, steps: Iterable[int], variants: Mapping[str, Any]) -> bool:
    """Whether a run of `then` and one of `to` steps have the same learning rate in each of `steps`."""
    optimizer = experiment.optimizer
    if then == to:
        return True
    return all(learning_rate(step, optimizer, then, variants) == learning_rate(step, optimizer, to, variants) for step in steps)


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


def find(handle: str, experiment: Experiment, source: Path, runs: Path, watch: bool = True) -> tuple[Resume | None, str]:
    """(the run that `handle` names, why): handle is auto, never, a run or a checkpoint; None if a new run begins. Rank 0 only.

    `source` is the experiment's folder, `runs` the folder that holds NAME/ID/. Raises a Mistake if the run cannot be resumed.
    `watch`: whether to wait for heartbeats of a run that says that it is running and cannot be seen; a dry run does not.
    """
    if handle == NEVER:
        return None, ""
    if handle == AUTO:
        folder, why = _newest_match(experiment, source, runs)
        if folder is None:
            return None, why
        _refuse_running(folder, watch)
        return _resume(folder, checkpoint_folder.latest(folder.checkpoints), experiment), why
    folder, checkpoint = run_folder.find_checkpoint(handle, runs)
    _refuse_other_experiment(folder, checkpoint, experiment, source)
    _refuse_running(folder, watch)
    return _resume(folder, checkpoint, experiment), run_folder.choice(handle, folder)


def _refuse_other_experiment(folder: RunFolder, checkpoint: Path, experiment: Experiment, source: Path) -> None:
    """Raises a Mistake if the run is not one of this experiment, or has nothing left to do."""
    if folder.name != source.name:
        raise Mistake(
            f"{folder.title} is a run of {folder.name}, this is {source.name} → launch experiments/{folder.name} to go on with it"
        )
    status = run_folder.status(read_json(folder.run), folder)
    if status == IMPORTED:
        raise Mistake(f"{folder.title} was imported, not trained: it holds weights alone → leave --resume out: init_from begins with them")
    steps = experiment.schedule.steps
    if status == FINISHED and steps <= _facts(checkpoint)["step"]:
        raise Mistake(
            f"{folder.title} has taken all of its {steps} steps → add --schedule.steps {2 * steps} to go on, or leave --resume out"
        )
    then, now = _variant_digests(folder, source, experiment)
    if then != now:  # a changed class is another model or training, which no setting shows
        raise Mistake(
            f"{source / VARIANTS} is not what {folder.title} was trained with (SHA-256 {then[:12]} → {now[:12]}) → "
            f"put {folder.source / VARIANTS} back, or begin a run of its own"
        )
    if refused := science(diff(serialization.load(folder.config), experiment)):
        raise Mistake(
            f"{folder.title} cannot go on with {_first(refused)}: its steps so far were taken with the old value → "
            "put it back, or begin a run of its own (without --resume), in a copy of the experiment's folder"
        )


def science(changes: list[Change]) -> list[Change]:
    """The changes that make it another experiment: those not in MAY_CHANGE."""
    return [change for change in changes if not belongs(change[0], MAY_CHANGE)]


def _first(changes: list[Change]) -> str:
    """The first MOST changes, and how many more there are."""
    return describe_changes(changes[:MOST]) + (f" and {len(changes) - MOST} more" if len(changes) > MOST else "")


def _resume(folder: RunFolder, checkpoint: Path, experiment: Experiment) -> Resume:
    changed = [change for change in diff(serialization.load(folder.config), experiment) if change[0] != "schema"]
    return Resume(folder, checkpoint, _facts(checkpoint), changed)


def _newest_match(experiment: Experiment, source: Path, runs: Path) -> tuple[RunFolder | None, str]:
    """The newest unfinished run with a checkpoint whose science and seed are `experiment`'s, and why it, or why there is none."""
    unfinished: dict[RunFolder, list[Change]] = {}  # run -> its differences
    damaged: list[str] = []
    finished: RunFolder | None = None
    for folder in run_folder.by_start(run_folder.of_experiment(runs / source.name)):
        if checkpoint_folder.newest_complete(folder.checkpoints) is None:
            continue
        try:
            status = run_folder.status(read_json(folder.run), folder)
            changes = science_changes(folder, source, experiment)
        except (OSError, ValueError):  # this does not keep another run from being resumed
            damaged.append(folder.title)
            continue
        if status == FINISHED:
            finished = finished if changes else folder
        elif status != IMPORTED:
            unfinished[folder] = changes

    matching = [folder for folder, changes in unfinished.items() if not changes]
    if len(matching) > 1:
        others = ", ".join(folder.title for folder in matching[:-1])
        return matching[-1], f"{matching[-1].title} is the newest unfinished run with these settings; older: {others}"
    if matching:
        return matching[0], ""

    # none: what is nearest
    unread = f"; {', '.join(damaged)} cannot be read" if damaged else ""
    if finished:
        return None, f"a new run: {finished.title}, which has these settings, is finished{unread}"
    if not unfinished:
        return None, f"a new run: {source.name} has no unfinished run with a checkpoint{unread}"
    nearest = min(reversed(unfinished), key=lambda folder: len(unfinished[folder]))
    why = f"no unfinished run has these settings; {nearest.title} is nearest, with {_first(unfinished[nearest])}"
    return None, f"a new run: {why}{unread}"


def science_changes(folder: RunFolder, source: Path, experiment: Experiment) -> list[Change]:
    """What makes the run another experiment than `experiment` of the folder `source`."""
    changes = science(diff(serialization.load(folder.config), experiment))
    then, now = _variant_digests(folder, source, experiment)
    return changes if then == now else [*changes, (VARIANTS, then[:12], now[:12])]


def _refuse_running(folder: RunFolder, watch: bool) -> None:
    """Raises a Mistake if the run is running: its process can be seen, or is out of sight and writes heartbeats while they are watched."""
    run = read_json(folder.run)
    if run_folder.status(run, folder) != RUNNING:
        return
    process = ProcessIdentity.from_json(run)
    seen = process is not None and process.is_alive()
    since = run.get("segments", [run])[-1].get("started")
    who = f"process {run.get('pid')} on {run.get('host')}, since {since}"
    if seen:
        raise Mistake(f"{folder.title} is running ({who}) → wait for its end, or end it: kill -USR1 {run['pid']}")
    watched = f"its heartbeat is watched for {WATCH_SECONDS:.0f} s …" if watch else "a dry run does not watch its heartbeat"
    sys.stderr.write(f"resume   {folder.title} says that it is running ({who}): {watched}\n")
    if watch and is_beating(folder, WATCH_SECONDS):
        end = f"wait for its end, or end it there: kill -USR1 {run.get('pid')}"
        raise Mistake(f"{folder.title} is running ({who}): it cannot be seen from here, but its heartbeat goes on → {end}")


def _facts(checkpoint: Path) -> dict[str, Any]:
    """What the manifest says without its tables. The file may come from a stranger."""
    path = checkpoint / MANIFEST
    try:
        with path.open("rb") as file:
            return parse(file.read(MAX_BYTES)).facts
    except (OSError, ValueError) as error:
        raise Mistake(f"{path} is not the manifest of a checkpoint: {error} → use another checkpoint of the run") from None


def _variant_digests(folder: RunFolder, source: Path, experiment: Experiment) -> tuple[str, str]:
    """The SHA-256 of variant.py then and now; equal if nothing of it changes the model or its training (a measurement does not)."""
    if not variant_names(experiment).keys() - {MEASURE}:
        return "", ""

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"

    return digest(folder.source / VARIANTS), digest(source / VARIANTS)
