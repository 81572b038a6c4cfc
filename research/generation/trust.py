"""What a verb that uses a run may read, write and execute because the run's folder says so: much for an own run, little for another's.

config.json of a stranger's run can name any file as its text, tokenizer or initial weights, any folder as its cache, classes of its
variant.py, which is a program, and a table for DeepSpeed, which writes wherever that says. Of a run without the mark of this checkout
(research/tracking/own_runs.py), unless its user trusts it:

- texts are read only if they are built in: a file of the run's own folder may unpack to any size;
- the tokenizer and the initial weights are read only if they are built in or lie in the run's own folder;
- what is cached goes into this checkout's own cache;
- variant.py is executed only if an experiment of this checkout has the same;
- DeepSpeed gets no table of the run's own;
- what only a training run uses (`evaluate`, `sample`, `track`, `profile`) is left at its defaults.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from parallel.files import user_path
from parallel.regular_files import read_regular
from research import ROOT
from research.config import Evaluate, Experiment, Profile, Sample, Track, serialization
from research.config.experiment_folder import VARIANTS, variant_names
from research.config.schema import Data
from research.config.sources import own_held_out_texts, texts_to_train_on
from research.data import documents, splits, tokenizer_file
from research.data.tokenizer import is_made_from_text
from research.tracking.own_runs import is_own, mark_as_own
from research.tracking.run_folder import RunFolder

NOT_READ = f"{documents.BUILTIN}not_read"
"""What stands for a text that may not be read, and is not needed."""
LARGEST_VARIANT = 2**20
UNKNOWN = "this run has no mark of this checkout (it was copied, was made by an older version or another checkout, or the key was deleted)"
WAY_OUT = "if it is yours, add --trust; in Python: api.load(run, trust=True)"


def trusted_settings(
    folder: RunFolder, trust: bool = False, reads: Collection[str] = (), trains: bool = False, root: Path = ROOT
) -> Experiment:
    """The settings of a run, without what may not be followed. Raises a Mistake if that is needed.

    `reads`: the texts that are needed, of `train` and `validation`; the tokenizer always is. `trains`: the verb trains steps again, with
    an engine, the loss and the optimizer, perhaps from the initial weights. `trust`: the user vouches for the run.
    """
    experiment = serialization.load(folder.config)
    if trust or is_own(folder):
        return experiment
    check_variant(folder, experiment, trains, root)
    if trains and experiment.deepspeed:
        names = ", ".join(experiment.deepspeed)
        raise _refused("deepspeed", names, folder, "can make DeepSpeed write files anywhere", "it is not passed on")
    initial = experiment.init_from
    if trains and initial is not None and not _is_within(folder, user_path(root, initial)):
        raise _refused("init_from", initial, folder, "lies outside of its folder", "it is not read")
    unused: dict[str, Any] = {"evaluate": Evaluate(), "sample": Sample(), "track": Track(), "profile": Profile(), "deepspeed": {}}
    data = _trusted_data(folder, experiment.data, reads, root)
    return experiment.model_copy(update=unused | {"data": data, "init_from": initial if trains else None})


def _trusted_data(folder: RunFolder, data: Data, reads: Collection[str], root: Path) -> Data:
    needed = {*reads, *(["train"] if is_made_from_text(data.tokenizer) else [])}
    if tokenizer_file.is_file(data.tokenizer) and not _is_within(folder, tokenizer_file.path_of(data.tokenizer, root)):
        raise _refused("data.tokenizer", data.tokenizer, folder, "lies outside of its folder", "it is not read")
    allowed: dict[str, str] = {"cache": str(Data.model_fields["cache"].default)}
    trained_on = [*texts_to_train_on(data.train), *(text for _, text in own_held_out_texts(data.train))]
    texts = {"train": trained_on, "validation": trained_on if splits.is_split(data.validation) else [data.validation]}
    for name, names in texts.items():
        unread = next((text for text in names if not text.startswith(documents.BUILTIN)), None)
        if unread is None:
            continue
        if name in needed:
            part = "a part of " * (name == "validation" and unread != data.validation)
            value = data.validation if part else unread
            raise _refused(f"data.{name}", value, folder, f"is {part}a file, not a built-in text", "it is not read")
        allowed[name] = NOT_READ
    return data.model_copy(update=allowed)


def executed_names(experiment: Experiment, trains: bool) -> dict[str, str]:
    """Dotted setting -> name in variant.py, of the classes that are used: those of the model; where a step is trained again, all."""
    return variant_names(experiment if trains else experiment.model)


def check_variant(folder: RunFolder, experiment: Experiment, trains: bool, root: Path = ROOT) -> None:
    """Raises a Mistake if classes of a variant.py that no experiment of this checkout has would be used."""
    named = executed_names(experiment, trains)
    path = folder.source / VARIANTS
    if named and path.is_file() and not is_known_variant(path, root):
        setting, name = next(iter(named.items()))
        what = f"is a class in {path}, a program that no experiment of this checkout has"
        raise _refused(setting, f"variant:{name}", folder, what, "it is not executed")


def said_of_trust(folder: RunFolder) -> str:
    """Marks a run that its user trusts as own, and says so, or why it could not be."""
    if mark_as_own(folder):
        return f"{folder.title} counts as a run of this checkout from now on, until its config.json or variant.py changes"
    return f"{folder.title} for this time only: its folder or this checkout cannot be written, so it gets no mark"


def is_known_variant(path: Path, root: Path = ROOT) -> bool:
    """Whether an experiment of this checkout has the same variant.py."""

    def digest(file: Path) -> str:
        return hashlib.sha256(read_regular(file, LARGEST_VARIANT)).hexdigest()

    try:
        return digest(path) in {digest(other) for other in (root / "experiments").glob(f"*/{VARIANTS}") if other.is_file()}
    except OSError:
        return False


def _is_within(folder: RunFolder, path: Path) -> bool:
    """Whether the path, its links followed, lies in the run's folder."""
    try:
        return path.resolve().is_relative_to(folder.path.resolve())
    except (OSError, RuntimeError, ValueError):
        return False


def _refused(setting: str, value: str, folder: RunFolder, why: str, what: str) -> Mistake:
    return Mistake(f"{setting} = {value!r:.200} of {folder.title} {why}: {what}, because {UNKNOWN} → {WAY_OUT}")
