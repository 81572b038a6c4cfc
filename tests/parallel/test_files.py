"""A staged folder appears completely or not at all, whatever is raised while it is written."""

import errno
import os
import shutil

import pytest

from parallel.errors import Mistake
from parallel.files import read_json, staged, write_json


def test_a_staged_folder_is_there_whole_or_not_at_all(tmp_path):
    with staged(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    for error in (ZeroDivisionError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), staged(tmp_path / "a" / "c") as folder:
            (folder / "file").write_text("x")
            raise error
    assert os.listdir(tmp_path / "a") == ["b"]
    with pytest.raises(Mistake, match="b is there already → name a folder that is not"), staged(tmp_path / "a" / "b"):
        raise AssertionError("the body must not run")
    with pytest.raises(Mistake, match="c is there already"), staged(tmp_path / "a" / "c"):
        (tmp_path / "a" / "c").mkdir()  # somebody else's, meanwhile
    assert sorted(os.listdir(tmp_path / "a")) == ["b", "c"]


def test_a_full_disk_names_the_file_that_did_not_fit(tmp_path, monkeypatch):
    """Of a copy it is the second file, not the one that was read."""

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    words = "partial/b cannot be written \\(No space left on device\\) → make room, or name another folder"
    with pytest.raises(Mistake, match=words), staged(tmp_path / "out") as folder:
        shutil.copyfile(tmp_path / "a", folder / "b")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not JSON (Expecting value"),
        (b'{"a": 1, "b"', "is not JSON (Expecting ':'"),
        (b"\xff", "is not JSON ('utf-8' codec"),
        (b"[" * 100_000, "is not JSON (it is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON (it has a number of 5,000 digits"),
        (b"[]", "holds no JSON object but a list"),
        (b"null", "holds no JSON object but a NoneType"),
    ],
)
def test_a_json_file_that_holds_no_object_is_a_mistake(content: bytes, problem: str, tmp_path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(Mistake) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path} {problem}") and "→ restore it" in str(caught.value)
    write_json(path, {"é": [1.5]})
    assert read_json(path) == {"é": [1.5]}
