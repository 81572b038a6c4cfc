"""Names that are no regular files are refused at once, whatever is behind them, and nothing is read beyond its bound."""

import os
import socket
from pathlib import Path

import pytest

from parallel.errors import Mistake
from parallel.regular_files import check_inside, open_regular, parsed_json, read_lines_bounded, read_regular, read_table


def special(tmp_path: Path) -> dict[str, Path]:
    """A pipe, a socket, a folder, and a link to a device."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's path has at most 108 characters
        one.bind("socket")
        os.chdir(here)
    return {name: tmp_path / name for name in ("pipe", "folder", "device", "loop", "socket")}


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    for name, path in special(tmp_path).items():
        with pytest.raises(OSError, match=name) as caught:
            open_regular(path)
        assert caught.value.strerror and (name in ("loop", "socket") or f"it is a {name}" in caught.value.strerror)
        with pytest.raises(Mistake, match=f"{name} cannot be read .* → do this"):
            read_table(path, "do this")


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    assert read_regular(path, 100) == b"x" * 100
    with pytest.raises(OSError, match="it has 100 bytes, more than 99"):
        read_regular(path, 99)
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(Mistake, match="it has 1,099,511,627,776 bytes, more than 1,000"):
        read_table(path, "do this", at_most=1000)


def test_values_are_counted_before_they_are_made() -> None:
    assert parsed_json(b'\xef\xbb\xbf{"a": [1, {"b": 2}]}', 8) == {"a": [1, {"b": 2}]}
    with pytest.raises(ValueError, match="it has up to 6 values, more than 5"):
        parsed_json(b'{"a": [1, {"b": 2}]}', 5)
    for raw, words in ((b"[NaN]", "NaN is not JSON"), (b"9" * 401, "a number of 401 digits"), (b"[" * 9999, "nested too deeply")):
        with pytest.raises(ValueError, match=words):
            parsed_json(raw)
    assert parsed_json(b"9" * 400) == int("9" * 400)


def test_a_line_without_end_is_left_out_and_not_held(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one\n" + b"x" * 10_000 + b"\n\nlast")
    with path.open("rb") as file:
        assert list(read_lines_bounded(file, 100)) == [b"one", b"", b"last"]


def test_links_may_not_lead_out_of_a_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "model" / "file", tmp_path / "secret"
    inside.parent.mkdir()
    for path in (inside, outside):
        path.write_text("x")
    (tmp_path / "model" / "near").symlink_to("file")
    (tmp_path / "model" / "far").symlink_to("../secret")
    (tmp_path / "linked").symlink_to("model")
    assert (
        check_inside(tmp_path / "model" / "near", tmp_path / "model")
        == inside
        == check_inside(tmp_path / "linked" / "file", tmp_path / "linked")
    )
    with pytest.raises(Mistake, match="far is a link that leads out of its folder, to .*secret → copy the file into the folder"):
        check_inside(tmp_path / "model" / "far", tmp_path / "model")
    with pytest.raises(Mistake, match="pipe is a pipe, not a file"):
        os.mkfifo(tmp_path / "model" / "pipe")
        check_inside(tmp_path / "model" / "pipe", tmp_path / "model")
