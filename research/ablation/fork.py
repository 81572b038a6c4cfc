"""A fork: a copy of an experiment's folder in which the settings that were asked for, `parent`, `changes` and the question are edited.

The copy is loaded before it appears: it is the parent with these changes, or it is refused. Imports no torch.
"""

import re
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import Mistake
from parallel.files import refuse_existing, staged
from research.ablation.lineage import refuse_unlaunchable
from research.ablation.source_edit import WAY_OUT, with_settings
from research.ablation.source_text import decoded, encoded
from research.config import Experiment
from research.config.diff import MOST, PLUMBING, Change, belongs, describe_changes, diff
from research.config.experiment_folder import CONFIG, LAUNCHER, RESULTS, load
from research.config.overrides import read_settings, replaced
from research.data import tokenizer, tokenizer_file
from research.data.splits import SPLIT, is_split
from research.data.stores import STORE
from research.data.tokenizer_file import FILE
from research.tracking.format import short_path

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")
SET_BY_FORK = ("parent", "changes")
LEFT_OUT = (RESULTS, "runs", "wandb", "checkpoints", "corpora", "__pycache__")
"""Folders of an experiment that are not part of it; nor are hidden ones."""
UNFINISHED = ("*.pyc", "*~", "*.tmp", "*.swp", ".*")
HELD_OUT = f"{SPLIT}0.05"
"""data.validation of a text that has no held-out part of its own."""


@dataclass(frozen=True)
class Fork:
    """A fork that was made."""

    folder: Path
    parent: str
    changes: list[Change]
    """What affects results."""
    plumbing: list[Change]
    """What does not, without the parent, the changes and the question."""
    has_own_question: bool


def fork(source: Path, target: Path, assignments: Sequence[str] = (), question: str | None = None, text: Path | None = None) -> Fork:
    """Makes the folder `target`, whole or not at all: `source` with settings such as 'model.norm=rmsnorm', and `text` to train on."""
    source, target = source.resolve(), target if target.is_absolute() else Path.cwd() / target
    _refuse_place(source, target)
    parent = load(source).experiment
    values = read_settings(parent, assignments)
    for name in SET_BY_FORK:
        if name in values:
            raise Mistake(f"--set {name} is what fork writes itself → leave it out")
    values |= {} if text is None else _settings_of_text(text, parent, target.parent.parent, values)
    if question is not None:
        values["question"] = question
    own = replaced(parent, values)
    changed = [change for change in diff(parent, own) if change[0] not in ("schema", "question")]
    same = [name for name in values if name != "question" and not any(belongs(change, [name]) for change, _, _ in changed)]
    if same and text is None:
        raise Mistake(f"{same[0]} = {_value(parent, same[0])!r:.60} is what {source.name} has already → leave --set {same[0]} out")

    science = [change for change in changed if not belongs(change[0], PLUMBING)]
    lineage: dict[str, Any] = {"parent": source.name, "changes": tuple(name for name, _, _ in science)}
    wanted = {**lineage, **{name: _value(own, name) for name in values if name not in same}}
    expected = replaced(parent, values | lineage)
    with staged(target) as folder:
        shutil.copytree(source, folder, symlinks=True, ignore=_left_out, dirs_exist_ok=True)
        folder.chmod(folder.stat().st_mode | stat.S_IRWXU)  # the parent may be read-only
        try:
            _edit(folder / CONFIG, wanted, expected, short_path(source / CONFIG))
            refuse_unlaunchable(folder, expected)
        except Mistake as mistake:  # the hidden folder is gone when it is read
            raise Mistake(str(mistake).replace(folder.name, target.name)) from None
    plumbing = [change for change in changed if belongs(change[0], PLUMBING)]
    return Fork(target, source.name, science, plumbing, question is not None)


def _refuse_place(source: Path, target: Path) -> None:
    """Refuses a target that cannot be launched or is there, and a source that it could not name as its parent."""
    tree = target.parent.parent
    if not NAME.fullmatch(target.name) or target.parent.name != "experiments" or not (tree / "research" / LAUNCHER).is_file():
        raise Mistake(f"{target} is not the place of an experiment → write experiments/NAME")
    if source.parent != target.parent.resolve():
        raise Mistake(f"{source} does not lie beside {target.name}, which must find its parent → copy it into {target.parent} first")
    refuse_existing(target)


def _left_out(folder: str, names: list[str]) -> set[str]:
    """What is not copied: caches, runs, hidden and unfinished files, and whatever is neither a file, a folder nor a link."""
    kinds = (stat.S_ISREG, stat.S_ISDIR, stat.S_ISLNK)
    ignored = shutil.ignore_patterns(*LEFT_OUT, *UNFINISHED)(folder, names)
    return ignored | {name for name in names if not any(is_kind(Path(folder, name).lstat().st_mode) for is_kind in kinds)}


def _edit(path: Path, values: dict[str, Any], expected: Experiment, shown: str) -> None:
    """Edits a config.py, and refuses a result that does not load as `expected`."""
    text, encoding, end = decoded(path.read_bytes(), shown)
    edited, lines = with_settings(text, values, shown)
    path.unlink()  # it may be a link to the parent's own
    path.write_bytes(encoded(edited, encoding, end))
    where = f"{shown}:{max(lines.values())}" if lines else shown
    try:
        found = load(path.parent).experiment
    except Mistake as mistake:
        raise Mistake(f"{where}: the edited file does not load ({str(mistake).partition(' → ')[0]}) → {WAY_OUT}") from None
    wrong = [change for change in diff(expected, found) if change[0] in values or not belongs(change[0], PLUMBING)]
    if wrong:
        place = f"{shown}:{lines.get(wrong[0][0], max(lines.values()))}"
        raise Mistake(f"{place}: the file decides a setting elsewhere as well: edited there, it gives {_as_found(wrong)} → {WAY_OUT}")
    if found.model != expected.model:  # what follows from other settings, which pydantic's model_copy leaves as it was
        raise Mistake(f"{where}: model.head_size or model.output_bias does not follow from the edited settings → {WAY_OUT}")


def _as_found(wrong: list[Change]) -> str:
    """'model.norm = layernorm instead of rmsnorm'."""
    first = ", ".join(f"{name} = {found!r:.60} instead of {wanted!r:.60}" for name, wanted, found in wrong[:MOST])
    return first + (f" and {len(wrong) - MOST} more" if len(wrong) > MOST else "")


def _settings_of_text(text: Path, parent: Experiment, tree: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that train on a text of the user's: a file or folder of text, or a corpus that `prepare` has made."""
    if not text.exists():
        raise Mistake(f"--text {text} does not exist → name a file or folder of text, or a corpus that `prepare` has made")
    path = text.resolve()
    name = str(path.relative_to(tree.resolve()) if path.is_relative_to(tree.resolve()) else path)
    is_corpus = (path / "train.idx").is_file()
    if is_corpus:
        held_out = next((f"{STORE}{name}/{part}" for part in ("val", "test") if (path / f"{part}.idx").is_file()), HELD_OUT)
        values: dict[str, Any] = {"data.train": f"{STORE}{name}/train", "data.validation": held_out, "data.tokenizer": f"{name}/{FILE}"}
    else:
        validation = parent.data.validation
        values = {"data.train": name, "data.validation": validation if is_split(validation) else HELD_OUT}
    chosen = given.get("data.tokenizer", values.get("data.tokenizer", parent.data.tokenizer))
    if chosen.startswith(tokenizer.CHARS):
        raise Mistake(
            f"--text {text}: the size of {chosen} is known when the text has been read → python -m research prepare {text} --as NAME "
            f"--tokenizer {chosen}, then --text corpora/NAME"
        )
    is_file = tokenizer_file.is_file(chosen)
    values["model.vocab_size"] = tokenizer_file.declared_vocab_size(chosen, tree) if is_file else tokenizer.declared_vocab_size(chosen)
    return {name: value for name, value in values.items() if name not in given}


def _value(experiment: Experiment, name: str) -> Any:
    value: Any = experiment
    for part in name.split("."):
        value = getattr(value, part)
    return value


def describe(made: Fork) -> list[tuple[str, str]]:
    """(label, text) of a fork: what it changes."""
    lines = [("changes", describe_changes(made.changes) or "nothing that affects results")]
    lines += [("besides", f"{describe_changes(made.plumbing)} (affects no result)")] * bool(made.plumbing)
    if not made.has_own_question:
        lines.append(("question", f"still that of {made.parent} → add --question, or edit {CONFIG}"))
    return lines
