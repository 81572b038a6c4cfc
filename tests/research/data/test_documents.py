"""What a corpus may be, and what is said of one that cannot be read."""

import gzip
import hashlib
import json
import lzma
import subprocess
import sys

import pytest

from parallel.errors import Mistake
from research import ROOT
from research.data import documents

TEXTS = ["one", "zwei\r\n\u2028drei", "猫 🙂", ""]
SPLITS = {"train": (220, 1790, 2008, 10_275_792), "val": (8, 2009, 2016, 307_947), "test": (5, 2017, 2021, 177_419)}
JSONL = "".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


@pytest.mark.parametrize("split", SPLITS)
def test_builtin_corpus_is_split_by_date(split):
    count, first, last, size = SPLITS[split]
    path = documents.FOLDER / "state_of_the_union" / f"{split}.jsonl.xz"
    rows = [json.loads(line) for line in lzma.decompress(path.read_bytes()).splitlines()]
    years = [int(row["id"].split("_")[0]) for row in rows]
    assert (len(rows), min(years), max(years)) == (count, first, last)
    texts = list(documents.documents(f"builtin:state_of_the_union/{split}", ROOT))
    assert texts == [row["text"] for row in rows]
    assert sum(len(text.encode()) for text in texts) == size


def test_builtin_corpus_is_the_published_one():
    """SHA-256 of the uncompressed training split as it was received."""
    raw = lzma.decompress((documents.FOLDER / "state_of_the_union" / "train.jsonl.xz").read_bytes())
    assert hashlib.sha256(raw).hexdigest() == "68f8398996768c5428f9cd6314fced28abd71cc65fd2ca10587887da772f2bfc"


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.jsonl", JSONL),
        ("a.jsonl.xz", lzma.compress(JSONL)),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)),
        ("bom.jsonl", b"\xef\xbb\xbf" + JSONL),
        ("blank.jsonl", b"\n" + JSONL.replace(b"\n", b"\r\n \n") + b"\n"),
        ("no_newline_at_end.jsonl", JSONL.rstrip(b"\n")),
    ],
)
def test_every_kind_of_lines_file(tmp_path, name, raw):
    (tmp_path / name).write_bytes(raw)
    assert list(documents.documents(name, tmp_path)) == TEXTS
    assert list(documents.documents(str(tmp_path / name), ROOT)) == TEXTS  # an absolute path ignores root


def test_a_txt_file_is_one_document_unchanged(tmp_path):
    for codec in ("utf-8", "utf-8-sig"):
        (tmp_path / "a.txt").write_bytes("é\r\n\n\tend\n".encode(codec))
        assert list(documents.documents("a.txt", tmp_path)) == ["é\r\n\n\tend\n"]


LINE = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a.jsonl", LINE + b'{"text": "half\n', ["a.jsonl, line 2 is not JSON", '{"text": "one document"}']),
        ("a.jsonl", LINE + LINE + b'{"body": "x"}', ['a.jsonl, line 3 has no "text"']),
        ("a.jsonl", b'{"text": 5}', ['line 1 has no "text"']),
        ("a.jsonl", b'["text"]', ['line 1 has no "text"']),
        ("a.jsonl", LINE + b'{"text": "\xff"}', ["line 2 is not UTF-8", "byte 10"]),
        ("a.jsonl", LINE + b'{"text": "ab\\ud800"}', ["line 2 has half a surrogate pair at character 2"]),
        ("a.jsonl", b"[" * 100_000, ["line 1 is not JSON"]),
        ("a.jsonl", b"\n\n", ["holds no text"]),
        ("a.jsonl", b'{"text": ""}\n', ["holds no text"]),
        ("a.jsonl", b"", ["is empty", "builtin:state_of_the_union/train"]),
        ("a.txt", b"ab\xffcd", ["a.txt, line 1 is not UTF-8", "byte 2"]),
        ("a.txt", "ab".encode("utf-16"), ["a.txt is UTF-16 → save it as UTF-8"]),
        ("a.jsonl", LINE + b'{"text": "x", "number": ' + b"9" * 5000 + b"}", ["a.jsonl, line 2 is not JSON"]),
        ("a.jsonl.xz", b"not compressed", ["is not a whole .jsonl.xz file"]),
        ("a.jsonl.xz", lzma.compress(JSONL)[:-8], ["is not a whole .jsonl.xz file"]),
        ("a.jsonl.gz", b"not compressed", ["is not a whole .jsonl.gz file"]),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)[:-9], ["is not a whole .jsonl.gz file"]),
        ("a.bin", b"ab\0cd", ["is not text, its beginning is binary", ".txt, .md, .jsonl or .parquet"]),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, raw, words):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(Mistake) as caught:
        list(documents.documents(name, tmp_path))
    assert all(word in str(caught.value) for word in [*words, name, "→"]), str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere.jsonl", ["data.train = 'nowhere.jsonl'", "does not exist", "builtin:state_of_the_union/train"]),
        (".", ["holds no file of text", "it is empty"]),
        ("builtin:state_of_the_union/trian", ["builtin:state_of_the_union/train is meant?", "state_of_the_union/val"]),
        ("builtin:../gpt2/vocab", ["not a built-in corpus"]),
        ("builtin:", ["not a built-in corpus"]),
    ],
)
def test_what_is_missing_is_said_before_reading(tmp_path, spec, words):
    with pytest.raises(Mistake) as caught:
        documents.check_exists(spec, tmp_path, "data.train")
    assert all(word in str(caught.value) for word in [*words, "→"]), str(caught.value)


def test_digest_follows_content_and_kind(tmp_path):
    for name, raw in {"a.jsonl": LINE, "b.jsonl": LINE, "a.txt": LINE, "c.jsonl": LINE * 2}.items():
        (tmp_path / name).write_bytes(raw)
    a, b, text, c = (documents.digest(name, tmp_path) for name in ("a.jsonl", "b.jsonl", "a.txt", "c.jsonl"))
    assert a == b and len({a, text, c}) == 3


def test_a_folder_is_its_files_in_the_order_of_their_paths(tmp_path):
    """Its digest follows their names and contents, and nothing that is not read."""
    folder = tmp_path / "more"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "a.txt").write_text("second")
    (folder / "a.jsonl").write_bytes(JSONL)
    (folder / "c.py").write_text("last = 1\n")
    assert list(documents.documents("more", tmp_path)) == [*TEXTS, "second", "last = 1\n"]
    before = documents.digest("more", tmp_path)
    for ignored in (".hidden.txt", "picture.png"):
        (folder / ignored).write_bytes(b"\x89PNG\0")
    assert documents.digest("more", tmp_path) == before
    (folder / "c.py").rename(folder / "d.py")
    assert documents.digest("more", tmp_path) != before


def test_checking_imports_neither_torch_nor_tokenizers():
    program = "import sys, research.data; from research.data import documents; print('torch' in sys.modules, 'tokenizers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
