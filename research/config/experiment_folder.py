"""An experiment's folder: loads its config.py and variant.py by file path, and writes a config.py for imported weights.

Loading runs both files as programs, so run only those you trust. Writing goes the other way: names and numbers come from a file
of unknown origin, every value is written as a literal, and the written program evaluates to these values and does nothing else.
"""

import importlib.util
import math
import os
import sys
import traceback
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import SourceFileLoader
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ValidationError

from models.config import CHOICES, GPT, VARIANT
from models.encoder_config import AnyModel
from parallel.errors import Mistake, nearest
from research.config.schema import TRAINING_VARIANTS, Experiment
from research.config.settings import is_group, refusal

CONFIG, VARIANTS, LAUNCHER = "config.py", "variant.py", "launch.py"
RESULTS = "results"
"""The folder of a fork that holds its comparison with its parent."""
HEAD = '''"""{doc}"""

from research.config import {names}

config = '''
"""What a written config.py begins with."""


@dataclass(frozen=True)
class LoadedExperiment:
    """An experiment as its folder defines it."""

    experiment: Experiment
    folder: Path
    name: str

    @cached_property
    def variants(self) -> dict[str, Any]:
        """What the experiment names of its variant.py, by name. Imports torch, and only if there is anything."""
        return load_variants(self.folder, self.experiment)


def load(folder: Path | str) -> LoadedExperiment:
    """Run the folder's config.py and take its `config`. An error in the file is a Mistake that names file and line."""
    folder = Path(folder).resolve()
    path = folder / CONFIG
    if not path.is_file():
        raise Mistake(f"{_short(folder)} has no {CONFIG} → copy a folder that has one, such as experiments/gpt_sotu")
    config = getattr(_run(path), "config", None)
    if not isinstance(config, Experiment):
        problem = "defines no `config`" if config is None else f"defines config = {type(config).__name__}(…)"
        raise Mistake(f"{_short(path)} {problem} → write config = Experiment(…) in it")
    return LoadedExperiment(config, folder, folder.name)


def variant_names(settings: Experiment | AnyModel) -> dict[str, str]:
    """Dotted setting -> name, for each setting that says 'variant:Name': those of a model, or of a whole experiment."""
    model = settings.model if isinstance(settings, Experiment) else settings
    choices = {f"model.{setting}": getattr(model, setting) for setting in CHOICES}
    if isinstance(settings, Experiment):
        choices |= {setting: attrgetter(setting)(settings) for setting in TRAINING_VARIANTS}
    return {
        setting: choice.removeprefix(VARIANT)
        for setting, choice in choices.items()
        if isinstance(choice, str) and choice.startswith(VARIANT)
    }


def check_variants(folder: Path, settings: Experiment | AnyModel) -> None:
    """Refuses settings that name something of variant.py where there is no such file. Reads no file, and needs no torch."""
    for setting, name in variant_names(settings).items():
        if not (folder / VARIANTS).is_file():
            raise Mistake(f"{setting} = '{VARIANT}{name}' but {_short(folder)} has no {VARIANTS} → write {name} in {VARIANTS} there")


def load_variants(folder: Path, settings: Experiment | AnyModel) -> dict[str, Any]:
    """The classes and functions of variant.py that the settings name, by name. If they name none, the file is not run."""
    names = variant_names(settings)
    if not names:
        return {}
    check_variants(folder, settings)
    module = _run(folder / VARIANTS)
    defined = {name: value for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    for setting, name in names.items():
        if name not in defined:
            near = nearest(name, defined)
            way_out = f"did you mean {near}?" if near else f"write {name} there"
            raise Mistake(
                f"{setting} = '{VARIANT}{name}' but {_short(folder / VARIANTS)} has no {name}, "
                f"it has {', '.join(sorted(defined)) or 'none'} → {way_out}"
            )
    return {name: defined[name] for name in names.values()}


class _NoBytecodeLoader(SourceFileLoader):
    """Loads a source file without writing a __pycache__ into the experiment's folder."""

    def set_data(self, path: str, data: object, *, _mode: int = 0o666) -> None:
        """Write nothing."""


def _run(path: Path) -> ModuleType:
    """Execute a file as a module, registered under a name of its own so that dataclasses and pickle find its classes."""
    name = f"experiment_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_NoBytecodeLoader(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _mistake_in(path, error) from error
    return module


def _mistake_in(path: Path, error: Exception) -> Mistake:
    """The error that running the user's file raised, headed by file:line."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return Mistake(f"{_short(path)}:{error.lineno}: {error.msg} → correct the Python there")
    line = next((frame.lineno for frame in reversed(traceback.extract_tb(error.__traceback__)) if frame.filename == str(path)), None)
    place = f"{_short(path)}:{line}" if line else _short(path)
    if isinstance(error, Mistake):
        return Mistake(f"{place}: {error}")
    if isinstance(error, ValidationError):  # raised by a pydantic class that is not a group of settings
        return Mistake(f"{place}: {refusal(error, GPT)}")
    return Mistake(f"{place}: {type(error).__name__}: {' '.join(str(error).split())} → correct the Python there")


def _short(path: Path) -> str:
    """The path relative to the working directory, where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def write(folder: Path, config: Experiment, tree: Path) -> None:
    """Write config.py and launch.py into the experiment's folder; launch.py is that of the other experiments of `tree`."""
    (folder / CONFIG).write_text(source_of(config), encoding="ascii")
    (folder / LAUNCHER).write_bytes(launcher(tree))


def launcher(tree: Path) -> bytes:
    """The launch.py that all experiments of `tree` share."""
    for path in sorted((tree / "experiments").glob(f"*/{LAUNCHER}")):
        return path.read_bytes()
    raise Mistake(f"{tree / 'experiments'} has no experiment with a {LAUNCHER} → put experiments/gpt_sotu back")


def source_of(config: Experiment) -> str:
    """The text of a config.py that evaluates to `config`. Settings that have their default value are left out."""
    model = config.model
    doc = f"Imported weights: {model.num_layers} layers of width {model.hidden_size}, made by `python -m research import`."
    groups = {type(value).__name__ for name, value in _written_settings(config) if is_group(Experiment.model_fields[name])}
    names = sorted({"Experiment", *groups}, key=lambda name: (not name.isupper(), name))
    return HEAD.format(doc=doc, names=", ".join(names)) + _code(config, 0) + "\n"


def _written_settings(group: BaseModel) -> list[tuple[str, Any]]:
    """(name, value) of the settings that were set, and have no default or a value other than the default."""
    fields = type(group).model_fields
    default = {name: field.get_default(call_default_factory=True) for name, field in fields.items() if not field.is_required()}
    return [(name, value) for name, value in group if name in group.model_fields_set and (name not in default or value != default[name])]


def _code(value: Any, depth: int) -> str:
    """An ASCII expression that evaluates to `value`, made of calls of settings groups and of literals."""
    if isinstance(value, BaseModel):  # Name( one setting per line )
        indent = "    " * (depth + 1)
        lines = [f"{indent}{name}={_code(setting, depth + 1)},\n" for name, setting in _written_settings(value)]
        return f"{type(value).__name__}(\n{''.join(lines)}{'    ' * depth})" if lines else f"{type(value).__name__}()"
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} has no literal")
    if value is None or isinstance(value, (bool, int, float, str)):
        literal = ascii(value)
        plain = literal[0] == "'" and not {'"', "\\"} & set(literal)  # then double quotes, as elsewhere in this code, need no care
        return f'"{literal[1:-1]}"' if plain else literal
    if isinstance(value, tuple):
        return f"({' '.join(f'{_code(entry, depth)},' for entry in value)[: -1 if len(value) > 1 else None]})"
    raise TypeError(f"a {type(value).__name__} has no literal here")
