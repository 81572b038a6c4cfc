"""The token store: read by an independent reader, by byte offsets, and refused where it is broken."""

import hashlib
import json
import struct

import numpy as np
import pytest

from parallel.errors import Mistake
from parallel.files import published
from research.data import token_store

DOCUMENTS = [([5, 6, 7, 0], 11), ([0], 0), ([65499, 1, 0], 4)]


def write(tmp_path, vocab_size=65500, documents=DOCUMENTS):
    prefix = tmp_path / "split.v1"
    token_store.write(prefix, ((np.array(ids), size) for ids, size in documents), vocab_size, {"source": "here"})
    return prefix


@pytest.mark.parametrize(("vocab_size", "code", "name"), [(65500, 4, "<i4"), (200_000, 4, "<i4")])
def test_layout_by_offsets(tmp_path, vocab_size, code, name):
    check_layout(write(tmp_path, vocab_size), DOCUMENTS, code, name)


def test_layout_by_offsets_of_a_short_vocabulary(tmp_path):
    documents = [([5, 6, 7, 0], 11), ([65498, 0], 1)]
    check_layout(write(tmp_path, 65499, documents), documents, 8, "<u2")


def check_layout(prefix, documents, code, name):
    raw = (tmp := prefix.parent / f"{prefix.name}.idx").read_bytes()
    count, size = len(documents), np.dtype(name).itemsize
    assert tmp.is_file() and raw[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack("<Q", raw[9:17]) == (1,)
    assert raw[17] == code
    assert struct.unpack("<QQ", raw[18:34]) == (count, count + 1)
    lengths = struct.unpack(f"<{count}i", raw[34 : 34 + 4 * count])
    pointers = struct.unpack(f"<{count}q", raw[34 + 4 * count : 34 + 12 * count])
    assert struct.unpack(f"<{count + 1}q", raw[34 + 12 * count :]) == tuple(range(count + 1))
    stream = (prefix.parent / f"{prefix.name}.bin").read_bytes()
    found = [np.frombuffer(stream, name, n, at).tolist() for n, at in zip(lengths, pointers, strict=True)]
    assert found == [ids for ids, _ in documents]
    assert len(stream) == sum(lengths) * size


def test_reader_gives_back_what_was_written(tmp_path):
    found = token_store.TokenStore(write(tmp_path))
    assert found.tokens.tolist() == [i for ids, _ in DOCUMENTS for i in ids]
    assert found.document_offsets().tolist() == [0, 4, 5, 8]
    assert (found.num_tokens, found.num_documents, found.num_bytes) == (8, 3, 15)
    assert found.facts["source"] == "here"
    assert isinstance(found.tokens.base, np.memmap) and not found.tokens.flags.writeable


def test_reads_documents_of_several_sequences_as_megatron_writes_them(tmp_path):
    """Two documents in three sequences, put together here by hand."""
    (tmp_path / "m.bin").write_bytes(np.arange(6, dtype="<u2").tobytes())
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 3) + struct.pack("<3i", 1, 2, 3) + struct.pack("<3q", 0, 2, 6)
    (tmp_path / "m.idx").write_bytes(index + struct.pack("<3q", 0, 2, 3))
    found = token_store.TokenStore(tmp_path / "m")
    assert found.document_offsets().tolist() == [0, 3, 6] and found.tokens.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(Mistake, match="m.json is missing"):
        _ = found.num_bytes


def test_an_id_that_is_not_in_the_vocabulary_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="65499 of document 2"):
        write(tmp_path, vocab_size=65499)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_visible_after_a_failure(tmp_path):
    def broken():
        yield np.array([1, 2]), 2
        raise Mistake("the corpus breaks here")

    with pytest.raises(Mistake, match="breaks here"):
        token_store.write(tmp_path / "x", broken(), 300, {})
    assert list(tmp_path.iterdir()) == []


def test_index_appears_last(tmp_path, monkeypatch):
    order, replace = [], published.__globals__["os"].replace
    monkeypatch.setattr("parallel.files.os.replace", lambda a, b: (order.append(b.suffix), replace(a, b)))
    write(tmp_path)
    assert sorted(order) == [".bin", ".idx", ".json"] and order[-1] == ".idx"
    assert not list(tmp_path.glob(".*"))


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def patch(path, at, raw):
    found = path.read_bytes()
    path.write_bytes(found[:at] + raw + found[at + len(raw) :])


@pytest.mark.parametrize(
    ("suffix", "harm", "words"),
    [
        (".bin", lambda p: cut(p, 31), ["has 31 bytes", "8 tokens = 32 bytes"]),
        (".bin", lambda p: p.write_bytes(p.read_bytes() + b"\0\0"), ["has 34 bytes"]),
        (".bin", lambda p: p.unlink(), ["is missing"]),
        (".idx", lambda p: p.unlink(), ["cannot be read"]),
        (".idx", lambda p: patch(p, 0, b"TNTIDX"), ["MMIDIDX"]),
        (".idx", lambda p: cut(p, 20), ["MMIDIDX"]),
        (".idx", lambda p: cut(p, 60), ["cut short"]),
        (".idx", lambda p: patch(p, 9, b"\2"), ["version 2"]),
        (".idx", lambda p: patch(p, 17, b"\6"), ["type code 6"]),
        (".idx", lambda p: patch(p, 18, b"\xff" * 8), ["cut short"]),
        (".idx", lambda p: patch(p, 34, struct.pack("<i", 3)), ["one after the other"]),
        (".idx", lambda p: patch(p, 34, struct.pack("<i", -4)), ["one after the other"]),
        (".idx", lambda p: patch(p, 70, struct.pack("<q", 9)), ["do not cover"]),
    ],
)
def test_a_broken_store_is_refused(tmp_path, suffix, harm, words):
    prefix = write(tmp_path)
    path = tmp_path / f"{prefix.name}{suffix}"
    harm(path)
    with pytest.raises(Mistake) as caught:
        token_store.TokenStore(prefix)
    assert all(word in str(caught.value) for word in [*words, str(path), "→"]), str(caught.value)


def test_a_broken_sidecar_is_refused(tmp_path):
    prefix = write(tmp_path)
    (tmp_path / f"{prefix.name}.json").write_text("{")
    with pytest.raises(Mistake, match="missing or broken"):
        _ = token_store.TokenStore(prefix).num_bytes


def test_ids_at_or_above_the_vocabulary_name_document_and_offset(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "CHUNK", 2)
    found = token_store.TokenStore(write(tmp_path))
    token_store.check_ids(found, 65500)
    with pytest.raises(Mistake, match=r"token id 65499 of document 2 at offset 0 is not below model.vocab_size = 65499 → set .* 65500"):
        token_store.check_ids(found, 65499)
    with pytest.raises(Mistake, match="token id 7 of document 0 at offset 2"):
        token_store.check_ids(found, 7)


def test_a_negative_id_is_refused(tmp_path):
    prefix = write(tmp_path)
    patch(tmp_path / f"{prefix.name}.bin", 16, struct.pack("<i", -1))
    with pytest.raises(Mistake, match="token id -1 of document 1 at offset 0"):
        token_store.check_ids(token_store.TokenStore(prefix), 70000)


def test_sidecar_is_plain_json(tmp_path):
    prefix = write(tmp_path)
    facts = json.loads((tmp_path / f"{prefix.name}.json").read_text())
    digests = {f"{end}_sha256": hashlib.sha256((tmp_path / f"{prefix.name}.{end}").read_bytes()).hexdigest() for end in ("bin", "idx")}
    assert facts == {"source": "here", "documents": 3, "tokens": 8, "bytes": 15, "max_id": 65499, **digests}


def test_many_documents_at_once_are_the_same_files(tmp_path, monkeypatch):
    """Also where the lengths are read back in several pieces."""
    one = write(tmp_path)
    monkeypatch.setattr(token_store, "CHUNK", 2)
    with token_store.StoreWriter(tmp_path / "many", 65500, {"source": "here"}) as writer:
        writer.add_documents(np.array(DOCUMENTS[0][0] + DOCUMENTS[1][0]), np.array([4, 1]), 11)
        writer.add_documents(np.array([], np.int64), np.array([], np.int64), 0)
        assert [path.name for path in tmp_path.glob("many*")] == []
        writer.add_documents(np.array(DOCUMENTS[2][0]), np.array([3]), 4)
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"many{suffix}").read_bytes() == (tmp_path / f"{one.name}{suffix}").read_bytes()
    with pytest.raises(ValueError, match="3 ids are not 4"), token_store.StoreWriter(tmp_path / "wrong", 65500, {}) as writer:
        writer.add_documents(np.array([1, 2, 3]), np.array([4]), 0)
    assert not [path for path in tmp_path.iterdir() if "wrong" in path.name]
