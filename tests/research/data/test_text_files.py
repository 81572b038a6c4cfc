"""Files of text as users have them: what is read of each kind, what is counted, and what is refused."""

import bz2
import gzip
import io
import json
import lzma
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import Mistake
from parallel.text import decoded_blocks
from research.data import text_files
from research.data.text_files import LeftOut, Reading, TextFile

zstd = pytest.importorskip("backports.zstd")
arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = ["one", "zwei\r\nétage", "猫 🙂"]
PACK = {"": lambda raw: raw, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd.compress}
LINES = "".join(json.dumps({"id": 1, "body": text}) + "\n" for text in TEXTS).encode()


def table(path, column, kind=None):
    parquet.write_table(
        arrow.table({"id": range(len(column)), "body": arrow.array(column, kind or arrow.string())}), path, row_group_size=2
    )


def read(path, reading=None, left=None, advance=lambda n: None):
    """The documents of a file."""
    found, parts = [], []
    for text, is_last in TextFile(path, path.name).fragments(reading or Reading(), left or LeftOut(), advance):
        parts.append(text)
        if is_last:
            found.append("".join(parts))
            parts = []
    assert not parts
    return found


@pytest.mark.parametrize("end", PACK)
def test_every_kind_compressed_or_not(tmp_path, end):
    for name, raw, texts in (
        ("a.txt", "".join(TEXTS).encode(), ["".join(TEXTS)]),
        ("a.jsonl", LINES, TEXTS),
        ("a.py", b"x = 1", ["x = 1"]),
    ):
        (tmp_path / f"{name}{end}").write_bytes(PACK[end](raw))
        assert read(tmp_path / f"{name}{end}", Reading("body")) == texts


def test_parquet_is_read_by_its_column(tmp_path):
    for kind in (arrow.string(), arrow.large_string()):
        table(tmp_path / "a.parquet", [*TEXTS, None], kind)
        assert read(tmp_path / "a.parquet", Reading("body")) == [*TEXTS, ""]
    with pytest.raises(Mistake, match="has no \"text\": its columns are 'id', 'body' → name the column"):
        read(tmp_path / "a.parquet")
    with pytest.raises(Mistake, match="the column 'id' holds int64, not text"):
        read(tmp_path / "a.parquet", Reading("id"))


def test_a_long_text_comes_in_pieces(tmp_path, monkeypatch):
    """No fragment is longer than a block, wherever characters of two to four bytes are cut."""
    monkeypatch.setattr(text_files, "BLOCK", 7)
    (tmp_path / "a.txt").write_bytes("é猫🙂x".encode() * 50)
    pieces = [text for text, _ in TextFile(tmp_path / "a.txt", "a.txt").fragments(Reading(), LeftOut())]
    assert "".join(pieces) == "é猫🙂x" * 50 and max(map(len, pieces)) <= 7 and len(pieces) > 50


@given(st.binary(max_size=60), st.integers(3, 9))
@settings(max_examples=150, deadline=None)
def test_blocks_are_decoded_as_the_whole(raw, size):
    """Python's own decoder of the whole is the reference: the text, the number of replacements, and the place of the first bad byte."""
    raw = raw.removeprefix(b"\xff\xfe").removeprefix(b"\xfe\xff").removeprefix(b"\xef\xbb\xbf")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
        return
    blocks = [raw[i : i + size] for i in range(0, len(raw), size)]
    found = list(decoded_blocks(blocks, "a", replace=True))
    whole = raw.decode("utf-8", "replace")
    genuine = raw.decode("utf-8", "ignore").count("\ufffd")
    assert "".join(text for text, _ in found) == whole
    assert sum(number for _, number in found) == whole.count("\ufffd") - genuine
    try:
        expected = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line, byte = raw[: error.start].count(b"\n") + 1, error.start - (raw.rfind(b"\n", 0, error.start) + 1)
        with pytest.raises(Mistake, match=rf"a, line {line} is not UTF-8 \(byte {byte}:"):
            list(decoded_blocks(blocks, "a"))
    else:
        assert "".join(text for text, _ in decoded_blocks(blocks, "a")) == expected


def test_what_is_not_utf8_is_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xffcd\xe9 \xef\xbf\xbd")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x\xfe"}\n{"text": "half \\ud800 and \\ud83d\\ude42"}\n')
    left, reading = LeftOut(), Reading(replace=True)
    assert read(tmp_path / "a.txt", reading, left) == ["ab\ufffdcd\ufffd \ufffd"] and left.replaced == 2
    assert read(tmp_path / "a.jsonl", reading, left) == ["x\ufffd", "half \ufffd and 🙂"] and left.replaced == 4


def test_marks_and_nulls(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": null}\n\n{"text": ""}\n{"text": "x"}')
    assert read(tmp_path / "a.txt") == ["ab"]
    assert read(tmp_path / "a.jsonl") == ["", "", "x"]


def test_the_bytes_read_are_told(tmp_path):
    """Whatever the kind, what is told adds up to the size of the file."""
    table(tmp_path / "a.parquet", TEXTS * 300)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES * 50))
    for path in tmp_path.iterdir():
        told = []
        assert len(read(path, Reading("body"), advance=told.append)) in (900, 150)
        assert sum(told) == path.stat().st_size


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a.jsonl", b'{"body": "x", "n": 1}', "line 1 has no \"text\": its keys are 'body', 'n' → name the key of the text: prepare --key"),
        ("a.jsonl", b'{"text": "' + b"x" * 200 + b'"}', "line 1 has more than 0 MiB, and a line of JSON is read whole"),
        ("a.txt.gz", gzip.compress(b"abc")[:-9], "is not a whole .txt.gz file"),
        ("a.txt.zst", zstd.compress(b"abc" * 99)[:-5], "is not a whole .txt.zst file"),
        ("a.md.zst", b"not compressed", "is not a whole .md.zst file"),
        ("a.parquet", b"PAR1 and no more", "is not a whole .parquet file"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "\xff"}'), "line 1 is not UTF-8"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "a.jsonl is UTF-16"),
    ],
    ids=["key", "long line", "cut gzip", "cut zstandard", "text for zstandard", "cut parquet", "no UTF-8", "UTF-16"],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, monkeypatch, name, raw, words):
    monkeypatch.setattr(text_files, "LONGEST_LINE", 100)
    (tmp_path / name).write_bytes(raw)
    for replace in (False, True) if "UTF-8" not in words else (False,):
        with pytest.raises(Mistake) as caught:
            read(tmp_path / name, Reading(replace=replace))
        assert words in str(caught.value) and str(tmp_path / name) in str(caught.value), str(caught.value)


def test_what_a_folder_holds_is_sorted_and_counted(tmp_path):
    for name, raw in {
        **{
            "b/x.md": b"# x",
            "a.txt": b"a",
            "c.parquet": b"PAR1",
            "code.py": b"x = 1\n",
            "notes": "naïve".encode(),
            "b.log.gz": gzip.compress(b"log"),
        },
        **{".hidden.txt": b"x", ".git/config": b"x", "picture.png": b"\x89PNG\r\n\x1a\n\0\0", "latin.txt2": b"caf\xe9 ", "empty.txt": b""},
        **{"archive.tar.gz": gzip.compress(b"a\0b"), "b/z.bz2": bz2.compress(b"x")},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "again").symlink_to(tmp_path / "b")
    (tmp_path / "again.txt").symlink_to(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    left = LeftOut()
    names = [file.name for file in text_files.find(tmp_path, "my", left)]
    assert names == ["my/a.txt", "my/b/x.md", "my/b.log.gz", "my/c.parquet", "my/code.py", "my/notes"]
    assert left.files == {"hidden": 2, "not text": 4, "empty": 1, "links": 2, "not a file": 1}
    assert left.sentence() == "10 files are left out (1 empty, 2 hidden, 2 links, 1 not a file, 4 not text)"


def test_what_is_named_itself_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "b.bin").write_bytes(b"ab\0")
    os.mkfifo(tmp_path / "pipe.txt")
    for name, words in {"none.txt": "does not exist", "empty.txt": "is empty", "b.bin": "is not text", "pipe.txt": "is a pipe"}.items():
        with pytest.raises(Mistake, match=f"{name} {words}.* → "):
            text_files.find(tmp_path / name, name, LeftOut())


def test_a_missing_package_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    monkeypatch.setattr(text_files.importlib.util, "find_spec", lambda name: None)
    for name in ("a.txt.zst", "a.parquet"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(Mistake, match="needs .* → pip install -r requirements-data.txt"):
            read(tmp_path / name)


def test_lines_are_bounded_in_memory():
    """A line without an end is not read further than its limit says that it is too long."""

    class Endless(io.RawIOBase):
        asked = 0

        def readline(self, size=-1):
            assert size == text_files.LONGEST_LINE + 1
            return b"x" * size

    with pytest.raises(Mistake, match="more than 16 MiB"):
        next(text_files._lines(Endless(), "a", Reading(), LeftOut()))
