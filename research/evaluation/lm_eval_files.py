"""The files that the tasks in a user's folder of YAML files read: what they include, their Python helpers, their data.

`files_of` follows the rules of lm-evaluation-harness and `datasets` for local files, and runs nothing. `opened_by` observes which
further files the helpers open while they run. Imports no lm_eval.
"""

import contextlib
import functools
import glob
import os
import sys
import sysconfig
from collections.abc import Collection, Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

FUNCTION = "!function"
"""The YAML tag before the dotted name of a Python function: `!function utils.process_docs`."""
MAKES_DATA = ("class", "custom_dataset")
"""Settings of a task whose data are made by Python code instead of being read from files that the YAML names."""
OWN = ("parallel", "models", "research", "__main__")
"""Tessera's own modules, by the first part of their names."""


class TaskFiles(NamedTuple):
    """What the tasks of a folder read."""

    paths: list[Path]
    """Every file in the folder, and those outside that its YAML files refer to, resolved and sorted."""
    complete: bool
    """False if Python code makes the data of a task, which may then come from anywhere."""


def files_of(folder: Path) -> TaskFiles:
    """What the tasks of a folder read, as far as it can be known before they run."""
    found, complete = {path.resolve() for path in folder.rglob("*") if path.is_file()}, True
    for path in sorted(found):
        if path.suffix == ".yaml":
            read: dict[Path, list[str]] = {}
            definition = _definition(path, read)
            for source, functions in read.items():
                found |= {source, *(file for function in functions for file in _files_of_function(function, source.parent))}
            for settings in _mappings(definition):
                found |= set(_data_files({**definition, **settings}))
                complete = complete and not any(name in settings for name in MAKES_DATA)
    return TaskFiles(sorted(found), complete)


@contextlib.contextmanager
def opened_by(helpers: Collection[Path]) -> Iterator[set[Path]]:
    """Yields a set that gets the files which code of `helpers` opens for reading, itself or through what it calls.

    On leaving, the sources of all modules are added that neither are Tessera's own nor belong to an installed package: a helper may
    use one that was imported earlier, and is then not opened. Other files of installed packages are left out: their versions are known.
    """
    found: set[Path] = set()
    codes, running = {str(path) for path in helpers if path.suffix == ".py"}, True
    resolved = functools.cache(os.path.realpath)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not running or event != "open" or not isinstance(arguments[0], str | bytes) or set(arguments[1] or "") & set("wax"):
            return
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and resolved(frame.f_code.co_filename) not in codes:
            frame = frame.f_back
        if frame is not None:
            found.add(Path(os.path.abspath(os.fsdecode(arguments[0]))))

    if codes:
        sys.addaudithook(hook)  # there is no way to remove a hook, so it is switched off
    try:
        yield found
    finally:
        running = False
        if codes:
            found |= set(_imported())
        found -= {path for path in found if path.suffix == ".pyc" or _is_installed(path) or not path.is_file()}


def _imported() -> Iterator[Path]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in OWN and isinstance(file := getattr(module, "__file__", None), str):
            yield Path(os.path.abspath(file))


def _is_installed(path: Path) -> bool:
    """Whether a file belongs to Python or to an installed package."""
    return str(path).startswith(_places()) or os.path.realpath(path).startswith(_places())


@functools.cache
def _places() -> tuple[str, ...]:
    """The folders of Python and of installed packages, with and without symbolic links."""
    places = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    return tuple(f"{place}{os.sep}" for place in {*places, *map(os.path.realpath, places)})


def _definition(path: Path, read: dict[Path, list[str]]) -> dict[str, Any]:
    """The settings of a YAML file over those of the files that it includes. Adds to `read` each file and the functions it names."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Collects the names of functions instead of importing them."""

    path = path.resolve()
    if path in read or not path.is_file():
        return {}
    functions = read[path] = list[str]()
    Loader.add_constructor(FUNCTION, lambda loader, node: functions.append(str(node.value)))
    with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError):  # the harness passes over such a file
        content = Loader(path.read_bytes()).get_single_data()
        if isinstance(content, dict):
            includes = content.pop("include", None) or []
            merged: dict[str, Any] = {}
            for include in includes if isinstance(includes, list) else [includes]:
                merged |= _definition(path.parent / str(include), read)
            return merged | content
    return {}


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """A mapping and all mappings in it, each once: a group may define tasks of its own, inline. YAML's aliases may nest without end."""
    waiting, seen = [value], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen or not isinstance(value, dict | list):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            yield value
        waiting += reversed(list(value.values()) if isinstance(value, dict) else value)


def _files_of_function(function: str, folder: Path) -> Iterator[Path]:
    """The Python files of a function: those beside its module in `folder`, or of the package that Python would import."""
    module = function.rpartition(".")[0]
    beside = (folder / f"{module.replace('.', '/')}.py").resolve()
    if beside.is_file():
        yield from beside.parent.glob("*.py")
        return
    spec = PathFinder.find_spec(module.partition(".")[0]) if module else None
    if spec is not None and spec.submodule_search_locations is not None:
        folders = [place for place in map(Path, spec.submodule_search_locations) if not _is_installed(place)]
        yield from (path.resolve() for place in folders for path in place.rglob("*.py"))
    elif spec is not None and spec.origin and not _is_installed(Path(spec.origin)):
        yield Path(spec.origin).resolve()


def _data_files(settings: Mapping[str, Any]) -> Iterator[Path]:
    """The local files that `datasets` loads for these settings of a task."""
    options = settings.get("dataset_kwargs")
    options = options if isinstance(options, dict) else {}
    source, inner = Path(str(settings.get("dataset_path") or "")), Path(str(options.get("data_dir") or ""))
    if source.is_file():
        yield source.resolve()
    patterns, bases = list(_texts(options.get("data_files"))), {inner, source, source / inner}
    if not patterns:  # all files of a folder that is named
        patterns, bases = ["**/*"], bases - {Path()}
    for pattern in patterns:
        name = pattern.rpartition("::")[2].removeprefix("file://")  # zip://inner.jsonl::archive.zip
        for place in {(base / name).expanduser() for base in bases}:
            paths = [place] if place.is_file() else map(Path, glob.iglob(str(place), recursive=True))
            yield from (path.resolve() for path in paths if path.is_file())


def _texts(value: Any) -> Iterator[str]:
    """The texts in data_files: one pattern, a list of some, or a table of either by split."""
    for each in value.values() if isinstance(value, dict) else [value]:
        yield from (text for text in (each if isinstance(each, list) else [each]) if isinstance(text, str))
