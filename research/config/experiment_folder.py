"""An experiment's folder: its config.py and variant.py, loaded by file path. They are programs; run only those you would run."""
# MERGED-DOC """An experiment's folder for weights that another program has trained: its config.py, written as code, every value a literal.
# MERGED-DOC
# MERGED-DOC Names and numbers come from a stranger's file: whatever they hold, what is written evaluates to them and does nothing else.
# MERGED-DOC """

import importlib.util
import math
import os
import sys
import traceback
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ValidationError

from models.config import CHOICES, GPT, VARIANT
from parallel.errors import Mistake, nearest
from research.config.schema import Experiment
from research.config.settings import is_group, refusal

CONFIG, VARIANTS = "config.py", "variant.py"


@dataclass(frozen=True)
class LoadedExperiment:
    """An experiment as its folder defines it."""

    experiment: Experiment
    folder: Path
    name: str

    @cached_property
    def variants(self) -> dict[str, type]:
        """The classes of variant.py that the model names, by name. Imports torch, and only if there are any."""
        return load_variants(self.folder, self.experiment.model)


def load(folder: Path | str) -> LoadedExperiment:
    """Run the folder's config.py and take its `config`. What is wrong in it is one sentence with file and line."""
    folder = Path(folder).resolve()
    path = folder / CONFIG
    if not path.is_file():
        raise Mistake(f"{_short(folder)} has no {CONFIG} → copy a folder that has one, such as experiments/gpt_sotu")
    config = getattr(_run(path), "config", None)
    if not isinstance(config, Experiment):
        found = "defines no `config`" if config is None else f"defines config = {type(config).__name__}(…)"
        raise Mistake(f"{_short(path)} {found} → write config = Experiment(…) in it")
    return LoadedExperiment(config, folder, folder.name)


def variant_names(model: GPT) -> dict[str, str]:
    """setting -> class name, for each setting of the model that says 'variant:Name'."""
    named = {setting: getattr(model, setting) for setting in CHOICES}
    return {setting: value.removeprefix(VARIANT) for setting, value in named.items() if value.startswith(VARIANT)}


def check_variants(folder: Path, model: GPT) -> None:
    """Refuse a model that names a class while there is no variant.py. Reads no file, so it may come before torch."""
    for setting, name in variant_names(model).items():
        if not (folder / VARIANTS).is_file():
            raise Mistake(
                f"model.{setting} = '{VARIANT}{name}' but {_short(folder)} has no {VARIANTS} → write class {name} in {VARIANTS} there"
            )


def load_variants(folder: Path, model: GPT) -> dict[str, type]:
    """The classes of variant.py that the model names, by name; {} and nothing run if it names none."""
    wanted = variant_names(model)
    if not wanted:
        return {}
    check_variants(folder, model)
    module = _run(folder / VARIANTS)
    classes = {name: value for name, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__}
    for setting, name in wanted.items():
        if name not in classes:
            near = nearest(name, classes)
            way_out = f"did you mean {near}?" if near else f"write class {name} there"
            raise Mistake(
                f"model.{setting} = '{VARIANT}{name}' but {_short(folder / VARIANTS)} has no class {name}, "
                f"it has {', '.join(sorted(classes)) or 'none'} → {way_out}"
            )
    return {name: classes[name] for name in wanted.values()}


class _Unwritten(SourceFileLoader):
    """Loads a source file and leaves no __pycache__ in the experiment's folder."""

    def set_data(self, path: str, data: object, *, _mode: int = 0o666) -> None:
        """Keep nothing."""


def _run(path: Path) -> ModuleType:
    """Execute a file as a module of its own name; registered, so that dataclasses and pickle find their classes in it."""
    name = f"experiment_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_Unwritten(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _said(error, path) from error
    return module


def _said(error: Exception, path: Path) -> Mistake:
    """What went wrong in the user's file, headed by file:line."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return Mistake(f"{_short(path)}:{error.lineno}: {error.msg} → correct the Python there")
    line = next((frame.lineno for frame in reversed(traceback.extract_tb(error.__traceback__)) if frame.filename == str(path)), None)
    place = f"{_short(path)}:{line}" if line else _short(path)
    if isinstance(error, Mistake):
        return Mistake(f"{place}: {error}")
    if isinstance(error, ValidationError):  # from a pydantic class that is not ours
        return Mistake(f"{place}: {refusal(error, GPT)}")
    return Mistake(f"{place}: {type(error).__name__}: {' '.join(str(error).split())} → correct the Python there")


def _short(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


LAUNCHER = "launch.py"
HEAD = '''"""{doc}"""

from research.config import {names}

config = '''


def source_of(config: Experiment) -> str:
    """config.py: a program that makes `config`. Settings that have their default are left out."""
    model = config.model
    doc = f"Imported weights: {model.num_layers} layers of width {model.hidden_size}, made by `python -m research import`."
    names = sorted({"Experiment", *_groups(config)}, key=lambda name: (name != "GPT", name))
    return HEAD.format(doc=doc, names=", ".join(names)) + _call(config, 0) + "\n"


def write(folder: Path, config: Experiment, tree: Path) -> None:
    """Fills the experiment's folder; launch.py is that of the other experiments of `tree`."""
    (folder / "config.py").write_text(source_of(config), encoding="ascii")
    (folder / LAUNCHER).write_bytes(launcher(tree))


def launcher(tree: Path) -> bytes:
    """The launch.py that all experiments of `tree` have."""
    for path in sorted((tree / "experiments").glob(f"*/{LAUNCHER}")):
        return path.read_bytes()
    raise Mistake(f"{tree / 'experiments'} has no experiment with a {LAUNCHER} → put experiments/gpt_sotu back")


def _call(group: BaseModel, depth: int) -> str:
    """`Name(` a setting a line `)`."""
    inside = "    " * (depth + 1)
    lines = [f"{inside}{name}={_code(value, depth + 1)},\n" for name, value in _given(group)]
    return f"{type(group).__name__}(\n{''.join(lines)}{'    ' * depth})" if lines else f"{type(group).__name__}()"


def _given(group: BaseModel) -> list[tuple[str, Any]]:
    """Settings that have no default, or another value."""
    fields = type(group).model_fields
    default = {name: field.get_default(call_default_factory=True) for name, field in fields.items() if not field.is_required()}
    return [(name, value) for name, value in group if name not in default or value != default[name]]


def _groups(group: BaseModel) -> set[str]:
    return {type(value).__name__ for name, value in _given(group) if is_group(type(group).model_fields[name])}


def _code(value: Any, depth: int) -> str:
    """A literal that evaluates to `value`, in ASCII."""
    if isinstance(value, BaseModel):
        return _call(value, depth)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} has no literal")
    if value is None or isinstance(value, (bool, int, float, str)):
        return _quoted(ascii(value))
    if isinstance(value, tuple):
        return f"({' '.join(f'{_code(entry, depth)},' for entry in value)[: -1 if len(value) > 1 else None]})"
    raise TypeError(f"a {type(value).__name__} has no literal here")


def _quoted(literal: str) -> str:
    """With the quotes of this house where nothing in it needs care."""
    return f'"{literal[1:-1]}"' if literal[0] == "'" and not {'"', "\\"} & set(literal) else literal
