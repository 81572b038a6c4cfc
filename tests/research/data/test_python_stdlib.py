"""Python's own library as a text: every file once, no package in two splits."""

import sysconfig
from pathlib import Path

from research.data import documents, python_stdlib
from research.data.documents import STDLIB


def test_no_package_is_in_two_splits_and_no_file_is_lost() -> None:
    found = {split: python_stdlib.files(split) for split in python_stdlib.SPLITS}
    library = Path(sysconfig.get_path("stdlib"))
    packages = {split: {path.relative_to(library).parts[0] for path in paths} for split, paths in found.items()}
    assert not packages["train"] & packages["val"] and not packages["train"] & packages["test"] and not packages["val"] & packages["test"]
    assert {"json", "asyncio", "decimal.py", "_pydecimal.py"} <= set().union(*packages.values())
    assert python_stdlib.split_of("decimal.py") == python_stdlib.split_of("_pydecimal.py") == python_stdlib.split_of("_decimal.py")
    whole = {path for path in library.rglob("*.py") if not {"site-packages", "test", "tests"} & set(path.parts)}
    assert len(whole - set().union(*map(set, found.values()))) < 0.2 * len(whole)
    assert all(found.values()) and not any("site-packages" in path.parts for paths in found.values() for path in paths)


def test_a_split_is_a_text_as_others_are(tmp_path) -> None:
    """Files in order, with a digest, named in the list of built-in texts."""
    spec = f"{STDLIB}test"
    paths = python_stdlib.files("test")
    assert documents.paths(spec, tmp_path) == paths and spec in documents.builtin_names()
    texts = list(documents.documents(spec, tmp_path))
    assert texts == [path.read_text("utf-8") for path in paths]
    assert documents.digest(spec, tmp_path) == documents.digest(spec, tmp_path) != documents.digest(f"{STDLIB}val", tmp_path)
    assert documents.check_exists(spec, tmp_path) == Path(sysconfig.get_path("stdlib"))
