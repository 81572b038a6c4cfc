"""Which code and libraries this process runs: versions of packages, digests of the library's and the experiment's own Python files."""

import hashlib
import platform
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from research.cluster.environment import git_state

LIBRARY = ("parallel", "models", "research")
"""The folders whose code computes a step."""
PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers", "safetensors", "einops")
"""Packages whose version may change a number, or what the ranks send one another."""


def versions(root: Path) -> str:
    """'tessera 0.1.0 · 7f3a2c1 · Python 3.11.9 · torch 2.13.0 · deepspeed 0.19.8', without importing any of them.

    A package that this Python lacks has a dash for its version.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    commit, dirty = git_state(root)
    words = [f"{project['name']} {project['version']}", f"{commit} (changed)" if dirty else commit, f"Python {sys.version.split()[0]}"]
    return " · ".join([*words, *(f"{package} {version_of(package).split('+')[0]}" for package in ("torch", "deepspeed"))])


def version_of(package: str) -> str:
    """'2.13.0+cpu'; '–' if this Python lacks the package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "–"


def library_versions() -> dict[str, str]:
    """The versions of Python and of PACKAGES, by name, without importing any of them."""
    return {"Python": platform.python_version(), **{package: version_of(package) for package in PACKAGES}}


def library_files(root: Path) -> dict[str, str]:
    """The SHA-256 of each Python file of the library, by its path from `root`."""
    return _digests(root, (path for folder in LIBRARY for path in (root / folder).rglob("*.py")))


def experiment_files(folder: Path) -> dict[str, str]:
    """The SHA-256 of each Python file in an experiment's folder, in folders below it too, by its path from there; none in hidden ones."""
    found = folder.rglob("*.py")
    return _digests(folder, (path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)))


def _digests(root: Path, paths: Iterable[Path]) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths) if path.is_file()}


def digest_of(files: dict[str, str]) -> str:
    """One digest of such a table."""
    return hashlib.sha256("".join(f"{name}\0{digest}\n" for name, digest in sorted(files.items())).encode()).hexdigest()
