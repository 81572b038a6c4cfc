"""Python's own library as a corpus of code: builtin:python_stdlib/train, /val and /test, read from the installation that runs this.

It is split by top-level package, so that no file of a package is held out while its neighbours are trained on. Another version of Python
has other files, so it is another text, which the fingerprint of a run tells apart. Its licence is Python's (the PSF licence).
"""

import hashlib
import sysconfig
from pathlib import Path

NAME = "python_stdlib"
SPLITS = ("train", "val", "test")
PARTS = 20
"""One part of PARTS of the packages is val, one is test."""
LEFT_OUT = ("site-packages", "dist-packages", "__pycache__", "lib-dynload", "test", "tests", "idle_test", "pydoc_data")
"""Folders that are not the library itself, its tests, and a table of texts that is no code."""
ALWAYS_TRAINED = ("lib2to3", "distutils", "idlelib", "encodings")
"""Packages that hold copies of other packages' code, or code that a program has written."""


def root() -> Path:
    """The folder of the library."""
    return Path(sysconfig.get_path("stdlib"))


def files(split: str) -> list[Path]:
    """The source files of a split, in order of their names. They may differ between installations of one version."""
    library, found = root(), []
    for path in sorted(library.rglob("*.py")):
        folders = path.relative_to(library).parts
        if not any(name in LEFT_OUT or name.startswith("config-") for name in folders[:-1]) and split_of(folders[0]) == split:
            found.append(path)
    return found


def split_of(package: str) -> str:
    """The split of a top-level module or package. _pydecimal, _decimal and decimal.py are in one, as are all of one name."""
    name = package.removesuffix(".py").removeprefix("_").removeprefix("py")
    if package in ALWAYS_TRAINED:
        return SPLITS[0]
    part = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % PARTS
    return {0: "val", 1: "test"}.get(part, "train")
