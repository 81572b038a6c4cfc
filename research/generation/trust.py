"""What a verb that uses a run may read, write and execute because the run's folder says so: much for an own run, little for another's.

config.json of a stranger's run can name any file as its text or tokenizer, any folder as its cache, and classes of its variant.py, which
is a program. Of a run that this checkout has not made (research/tracking/own_runs.py), unless its user trusts it:

- texts and the tokenizer are read only if they are built in or lie in the run's own folder;
- what is cached goes into this checkout's own cache;
- variant.py is executed only if an experiment of this checkout has the same.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path

from parallel.errors import Mistake
from parallel.regular_files import read_regular
from research import ROOT
from research.config import Experiment, serialization
from research.config.experiment_folder import VARIANTS, variant_names
from research.config.schema import Data
from research.data import documents, tokenizer_file
from research.data.tokenizer import TRAINED
from research.tracking.own_runs import is_own
from research.tracking.run_folder import RunFolder

TEXTS = ("train", "validation")
NOT_READ = f"{documents.BUILTIN}not_read"
"""What stands for a text that may not be read, and is not needed."""
LARGEST_VARIANT = 2**20
WAY_OUT = "look at it first; if you trust the run, add --trust (of research.api.load: trust=True)"


def trusted_settings(folder: RunFolder, trust: bool = False, reads: Collection[str] = (), root: Path = ROOT) -> Experiment:
    """The settings of a run, without what may not be followed. Raises a Mistake if that is needed.

    `reads`: the texts that are needed, of `train` and `validation`; the tokenizer always is. `trust`: the user vouches for the run.
    """
    experiment = serialization.load(folder.config)
    if trust or is_own(folder):
        return experiment
    check_variant(folder, experiment, root)
    data = experiment.data
    needed = {*reads, *(["train"] if data.tokenizer.startswith(TRAINED) else [])}
    if tokenizer_file.is_file(data.tokenizer) and not _is_within(folder, tokenizer_file.path_of(data.tokenizer, root)):
        raise _outside(folder, "tokenizer", data.tokenizer)
    allowed: dict[str, str] = {"cache": str(Data.model_fields["cache"].default)}
    for name in TEXTS:
        text = getattr(data, name)
        if text.startswith(documents.BUILTIN) or _is_within(folder, Path(root) / Path(text).expanduser()):
            continue
        if name in needed:
            raise _outside(folder, name, text)
        allowed[name] = NOT_READ
    return experiment.model_copy(update={"data": data.model_copy(update=allowed)})


def check_variant(folder: RunFolder, experiment: Experiment, root: Path = ROOT) -> None:
    """Raises a Mistake if the run's settings name classes of a variant.py that no experiment of this checkout has."""
    named = variant_names(experiment)
    path = folder.source / VARIANTS
    if named and path.is_file() and not is_known_variant(path, root):
        setting, name = next(iter(named.items()))
        what = f"{setting} = 'variant:{name}' is a class in {path}, a program that no experiment of this checkout has"
        raise Mistake(f"{what}: it is not executed → {WAY_OUT}")


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


def _outside(folder: RunFolder, name: str, value: str) -> Mistake:
    what = f"data.{name} = {value!r:.200} of {folder.title} lies outside of its folder, and this checkout has not made the run"
    return Mistake(f"{what}: it is not read → {WAY_OUT}")
