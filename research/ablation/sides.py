"""The sides of a comparison: finds the finished runs that a person names, one for each seed, and reads them. Imports no torch.

A side is an experiment's folder (experiments/gpt_sotu), the folder of its runs (runs/gpt_sotu), its name, or runs one by one with commas
between them. `gpt_sotu:optimizer.lr=0.001` keeps the runs with this setting, of several with commas those with all of them.
"""

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.estimates.flops import training_flops
from models.estimates.parameters import parameters
from parallel.checkpoint.damage import read_manifest
from parallel.checkpoint.folder import newest_complete
from parallel.checkpoint.manifest import WEIGHTS
from parallel.errors import Mistake, listed, listed_up_to, nearest
from research import ROOT
from research.config import Experiment, experiment_folder, serialization
from research.config.diff import PLUMBING, belongs, flatten
from research.tracking import metrics, run_folder, run_record, run_status
from research.tracking.format import plural
from research.tracking.run_folder import FINISHED, LATEST, RunFolder

CONDITION = re.compile(r":(?=[A-Za-z_][\w.]*=)")
"""Between the place of a side and the settings of its runs. The colon of a path or of a text has no 'setting=' behind it."""
MOST = 3
"""The most runs or values that one sentence names."""
TOKENS, FLOPS = "progress/tokens", "progress/flops"


@dataclass(frozen=True)
class FinishedRun:
    """A run that has taken all its steps."""

    folder: RunFolder
    experiment: Experiment
    rows: Sequence[dict[str, Any]]
    record: dict[str, Any]
    """Its run.json."""
    fingerprint: str | None
    """Of its texts and its tokenizer; None if it has no checkpoint that says so."""
    saved_parameters: int | None = None
    """Parameters in its newest checkpoint; None if it has none."""

    @property
    def seed(self) -> int:
        """What it is paired by."""
        return self.experiment.seed

    @property
    def parameters(self) -> int | None:
        """Unique parameters; None if there is no checkpoint, and no formula counts a class of variant.py."""
        return self.saved_parameters or parameters(self.experiment.model)

    @property
    def flops(self) -> float | None:
        """Model FLOPs of the whole training; None if no formula counts them, or nothing was logged."""
        return max((row[FLOPS] for row in self.rows if FLOPS in row), default=None)

    @property
    def settings(self) -> dict[str, Any]:
        """By dotted name."""
        return flatten(serialization.resolved(self.experiment))


@dataclass(frozen=True)
class Side:
    """The runs of one side, which differ in their seeds and in settings that affect no result."""

    label: str
    runs: dict[int, FinishedRun]
    """By seed."""
    warnings: tuple[str, ...] = ()

    @property
    def first(self) -> FinishedRun:
        """The run of the lowest seed."""
        return self.runs[min(self.runs)]


def find_sides(words: Sequence[str], runs: Path = Path("runs")) -> list[Side]:
    """The sides in order, with labels that tell them apart."""
    sides = [find_side(word, runs) for word in words]
    labels = [side.label for side in sides]
    return [side if labels.count(side.label) == 1 else replace(side, label=word) for side, word in zip(sides, words, strict=True)]


def find_side(word: str, runs: Path = Path("runs")) -> Side:
    """The finished runs that `word` names. Raises a Mistake if there is none, if one that is named itself has not ended, or if they differ
    in what affects results. Warns of the runs of an experiment that are left out because they have not finished."""
    places, *conditions = CONDITION.split(word, maxsplit=1)
    wanted = dict(condition.partition("=")[::2] for condition in conditions[0].split(",")) if conditions else {}
    found: list[FinishedRun] = []
    left_out: list[str] = []
    names: list[str] = []
    for place in filter(None, places.split(",")):
        name, folders = _folders(place, runs)
        names.append(name)
        for folder in run_folder.by_start(folders):
            if problem := _unfinished(folder):
                if len(folders) == 1 and folder.title == name:
                    raise Mistake(f"{folder.title} {problem} → only finished runs are compared: resume it, or name others")
                left_out.append(f"{folder.title} {problem}")
            else:
                found.append(read_finished(folder))
    if not names:
        raise Mistake(f"{word!r:.100} names no run → name an experiment's folder, or a run: runs/NAME/ID")
    label = ", ".join(dict.fromkeys(names))
    if not found:
        reason = f": {listed_up_to(left_out, MOST)}" if left_out else ""
        raise Mistake(f"{label} has no finished run{reason} → train it: python experiments/{Path(names[0]).name}/launch.py --seed 1")
    found = _with_settings(found, wanted, label)
    _refuse_mixture(found, label)
    warnings = [f"left out of {label}: {listed_up_to(left_out, MOST)}"] if left_out else []
    by_seed: dict[int, FinishedRun] = {}
    for run in found:  # the one that started last is the last
        if run.seed in by_seed:
            warnings.append(f"{label} has several runs of seed {run.seed}: {run.folder.title} is compared, which started last")
        by_seed[run.seed] = run
    conditioned = f"{label}:{conditions[0]}" if conditions else label
    return Side(conditioned, dict(sorted(by_seed.items())), tuple(warnings))


def _folders(place: str, runs: Path) -> tuple[str, list[RunFolder]]:
    """(what to call it, its run folders) of a place without conditions; a single run is called by its title."""
    path = Path(place)
    if (path / experiment_folder.CONFIG).is_file():
        loaded = experiment_folder.load(path)
        return loaded.name, run_folder.of_experiment(ROOT / loaded.experiment.track.runs / loaded.name)
    for candidate in (path, runs / path):
        with contextlib.suppress(OSError):
            if candidate.name != LATEST and not (candidate / "run.json").is_file() and (folders := run_folder.of_experiment(candidate)):
                return candidate.resolve().name, folders
    folder = run_folder.find(place, runs)
    return folder.title, [folder]


def _unfinished(folder: RunFolder) -> str:
    """Why a run cannot be compared, for the middle of a sentence; '' if it has finished."""
    run = run_record.read(folder)
    status = run_status.status(run, folder)
    if status == FINISHED:
        return ""
    last = metrics.last(folder.metrics, ["progress/step"]).get("progress/step", 0)
    reason = f" ({run['reason']})" if run.get("reason") else ""
    return f"has not finished: it is {status}{reason} at step {last} of {run.get('steps') or '?'}"


def read_finished(folder: RunFolder) -> FinishedRun:
    """A run that has finished, read from its folder."""
    fingerprint = saved = None
    if checkpoint := newest_complete(folder.checkpoints):
        with contextlib.suppress(Mistake):  # damaged, or of another version
            manifest = read_manifest(checkpoint)
            fingerprint = manifest.facts.get("data")
            saved = sum(tensor.numel for tensor in manifest.tensors[WEIGHTS].values())
    experiment, known = serialization.load(folder.config), fingerprint if isinstance(fingerprint, str) else None
    rows = [*metrics.read(folder.metrics)]
    per_token = _flops_per_token(experiment)
    if per_token is not None:
        rows = [row | {FLOPS: float(row[TOKENS] * per_token)} if isinstance(row.get(TOKENS), (int, float)) else row for row in rows]
    return FinishedRun(folder, experiment, rows, run_record.read(folder), known, saved)


def _flops_per_token(experiment: Experiment) -> int | None:
    """Model FLOPs of training on one token; None if no formula counts them, or if the length of the sequences rises during the run."""
    return None if experiment.schedule.length_ramp else training_flops(experiment.model)


def _with_settings(runs: Sequence[FinishedRun], wanted: dict[str, str], label: str) -> list[FinishedRun]:
    """The runs whose settings have these values, written as JSON or, for a text, without its quotes."""
    for name, text in wanted.items():
        if name not in (known := runs[0].settings):
            near = nearest(name, known)
            raise Mistake(f"{label}: there is no setting {name} → " + (f"did you mean {near}?" if near else "see config.json of a run"))
        values = [run.settings.get(name) for run in runs]
        runs = [run for run, value in zip(runs, values, strict=True) if value == _value(text)]
        if not runs:
            has = listed(sorted({_shown(value) for value in values}), "and")
            raise Mistake(f"{label} has no finished run with {name} = {text:.60} → its runs have {has}")
    return list(runs)


def _value(text: str) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return text


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _refuse_mixture(runs: Sequence[FinishedRun], label: str) -> None:
    """Raises a Mistake if runs of one side differ in a setting that affects results, other than the seed."""
    tables = [run.settings for run in runs]
    for name in dict.fromkeys(name for table in tables for name in table):
        values = list(dict.fromkeys(_shown(table.get(name)) for table in tables))
        if len(values) > 1 and not belongs(name, (*PLUMBING, "seed")):
            way_out = f"name one kind of them, such as {label}:{name}={values[-1]:.60}, or runs one by one with commas between them"
            raise Mistake(f"the {plural(len(runs), 'finished run')} of {label} differ in {name}: {listed_up_to(values, MOST)} → {way_out}")
