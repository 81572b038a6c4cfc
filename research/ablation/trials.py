"""The trials of a sweep: an experiment with each combination of a grid's values, once per seed; and which of them have been run.

What has been run is read from the runs folder each time, so that nothing is run twice, whatever became of the sweep that ran it.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel.checkpoint import folder as checkpoint_folder
from parallel.errors import Mistake, listed
from research.ablation.lineage import differences
from research.config import Experiment, serialization
from research.config.checks import check_settings
from research.config.diff import PLUMBING, belongs, flatten
from research.config.experiment_folder import VARIANTS, LoadedExperiment, check_variants
from research.config.overrides import parse
from research.data.prepare import check as check_data
from research.tracking import run_folder
from research.tracking.run_folder import FINISHED, IMPORTED, RunFolder

SEED = "seed"
OWN = ("seed", "track", "question", "parent", "changes")
"""What a grid may not vary: seeds have an option of their own, and the others change no run."""
LARGEST_LABEL = 64
"""Characters of a tag."""

Factor = tuple[str, tuple[str, ...]]
"""The dotted name of a setting, and its values as written on a command line."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    number: int
    factors: tuple[tuple[str, str], ...]
    """The grid's settings with their values."""
    seed: int
    arguments: tuple[str, ...]
    """What follows launch.py: the settings that all trials share, then the factors and the seed."""
    experiment: Experiment

    @property
    def label(self) -> str:
        """'optimizer.lr=1e-3 seed=1337'."""
        return " ".join(f"{name}={value}" for name, value in (*self.factors, (SEED, str(self.seed))))

    @property
    def tags(self) -> tuple[str, ...]:
        """The W&B tags of its factors, such as 'lr:1e-3' and 'seed:1337'."""
        pairs = [(name.rpartition(".")[2], value) for name, value in (*self.factors, (SEED, str(self.seed)))]
        return tuple(f"{name}:{value}"[:LARGEST_LABEL] for name, value in pairs)


def factor(text: str) -> Factor:
    """'optimizer.lr=1e-3,3e-4' -> ('optimizer.lr', ('1e-3', '3e-4')). A tuple is written with spaces: betas=0.9 0.95,0.9 0.99."""
    name, equals, values = text.partition("=")
    name = name.removeprefix("--").replace("-", "_")
    found = tuple(value.strip() for value in values.split(","))
    if not equals or not all(found):
        raise Mistake(f"--grid {text!r} has no values → write NAME=VALUE,VALUE, such as optimizer.lr=1e-3,3e-4")
    if belongs(name, OWN):
        instead = "use --seeds" if name == SEED else "vary a setting that changes what is trained"
        raise Mistake(f"--grid {name} makes no ablation → {instead}")
    if repeated := next((value for value in found if found.count(value) > 1), None):
        raise Mistake(f"--grid {name} has the value {repeated} twice → leave one of them out")
    return name, found


def seeds(text: str, first: int) -> list[int]:
    """'3' -> the experiment's own seed and the two that follow it; '1,5,9' -> these."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and len(word.strip()) <= 10 for word in words):
        raise Mistake(f"--seeds {text!r} is neither a number of seeds nor a list of them → write 5, or 1,2,3")
    numbers = [int(word) for word in words]
    if len(numbers) == 1:
        if not 0 < numbers[0] <= 1000:
            raise Mistake(f"--seeds {numbers[0]} is no number of seeds → use 1 to 1000, or a list such as 1,2,3")
        return list(range(first, first + numbers[0]))
    if len(set(numbers)) < len(numbers):
        raise Mistake(f"--seeds {text} has a seed twice → leave it out")
    return numbers


def trials(
    loaded: LoadedExperiment, factors: Sequence[Factor], seed_numbers: Sequence[int], settings: Sequence[str], root: Path
) -> list[Trial]:
    """Every combination with every seed, seed by seed, so that a sweep that is stopped has as many seeds of each as it can.

    A Mistake if a setting does not exist, if a value or a text does not work, or if two trials would train the same.
    """
    names = [name for name, _ in factors]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise Mistake(f"--grid {repeated} is given twice → write all of its values in one")
    found, seen = list[Trial](), dict[str, str]()
    for seed, values in itertools.product(seed_numbers, itertools.product(*(values for _, values in factors))):
        pairs = tuple(zip(names, values, strict=True))
        arguments = (*settings, *(f"--{name}={value}" for name, value in (*pairs, (SEED, str(seed)))))
        experiment, _, options = parse(loaded.experiment, arguments)
        if options.trains_nothing or options.resume != "never":
            raise Mistake("--help, --version, --dry-run, --check-cluster and --resume do not go with a sweep → leave them out")
        check_settings(experiment)
        check_variants(loaded.folder, experiment)
        check_data(experiment.data, root, experiment.model.vocab_size)
        trial = Trial(len(found), pairs, seed, arguments, experiment)
        other = seen.setdefault(science_digest(experiment), trial.label)
        if other != trial.label:
            raise Mistake(f"{other} and {trial.label} train the same: only the layout or the records differ → leave one of them out")
        found.append(trial)
    return found


def science_digest(experiment: Experiment) -> str:
    """SHA-256 (hex) of the settings that affect results."""
    flat = flatten(serialization.resolved(experiment))
    settings = {name: value for name, value in flat.items() if not belongs(name, PLUMBING)}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def sweep_id(name: str, found: Iterable[Trial]) -> str:
    """Eight hexadecimal digits: the same for the same trials of the same experiment, in whatever order they are written."""
    digests = sorted(science_digest(trial.experiment) for trial in found)
    return hashlib.sha256("\0".join([name, *digests]).encode()).hexdigest()[:8]


def runs_of(trial: Trial, loaded: LoadedExperiment, root: Path) -> list[RunFolder]:
    """The runs that train what the trial does, the oldest first, whoever has launched them."""
    found = []
    for folder in run_folder.by_start(run_folder.of_experiment(root / trial.experiment.track.runs / loaded.name)):
        with contextlib.suppress(OSError, ValueError):
            if run_folder.read_run(folder).get("status") == IMPORTED:
                continue
            then, now = (path.read_bytes() if path.is_file() else None for path in (folder.source / VARIANTS, loaded.folder / VARIANTS))
            if not differences(serialization.load(folder.config), then, trial.experiment, now):
                found.append(folder)
    return found


def finished(folders: Iterable[RunFolder]) -> RunFolder | None:
    """The first of the runs that has taken all of its steps."""
    return next((folder for folder in folders if run_folder.read_run(folder).get("status") == FINISHED), None)


def begun(folders: Iterable[RunFolder]) -> RunFolder | None:
    """The newest of the runs that has not finished and has a checkpoint to go on from."""
    unfinished = [folder for folder in folders if checkpoint_folder.newest_complete(folder.checkpoints) is not None]
    return unfinished[-1] if unfinished else None


def describe(loaded: LoadedExperiment, factors: Sequence[Factor], seed_numbers: Sequence[int], count: int) -> str:
    """'gpt_sotu · 6 trials = 2 optimizer.lr × 3 seeds (1337, 1338 and 1339)'."""
    sizes = [f"{len(values)} {name}" for name, values in factors]
    shown = listed(seed_numbers, "and") if len(seed_numbers) <= 5 else f"{seed_numbers[0]} … {seed_numbers[-1]}"
    product = " × ".join([*sizes, f"{len(seed_numbers)} seed{'s' * (len(seed_numbers) > 1)}"])
    return f"{loaded.name} · {count} trial{'s' * (count > 1)} = {product} ({shown})"
