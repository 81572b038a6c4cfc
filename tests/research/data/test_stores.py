"""Stores named by `store:PREFIX`: of other programs and of our own, read once, opened without being read, refused in a sentence."""

import ctypes
import json
import mmap
import os
import shutil
import struct
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from parallel.errors import Mistake
from research.data import documents, prepare, tokenizer_file
from research.data import stores as token_stores
from research.data.records import Cache, silent
from research.data.text_stores import joined
from research.data.token_store import StoreWriter, TokenStore
from tests.research.data.conftest import settle
from tests.research.data.test_prepare import noting
from tests.research.data.test_records import rewrite
from tests.research.helpers import megatron_files


@pytest.fixture
def corpus(settings, tmp_path):
    """The corpus of `settings`, whose tokenizer lies in tokenizer.json from now on."""
    found = prepare.load(settings, tmp_path, 300)
    found.tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    return found


def foreign(store: TokenStore, prefix: Path) -> None:
    """The documents of a store as a file of Megatron-LM's, the first of them in two sequences."""
    texts = [store.tokens[begin:end].tolist() for begin, end in store.documents()]
    megatron_files.write(prefix, [[texts[0][:3], texts[0][3:]], *([text] for text in texts[1:])], 8, "<u2")
    settle(*prefix.parent.glob(f"{prefix.name}.*"))


@pytest.fixture
def stores(corpus, tmp_path):
    """Settings that name stores of Megatron-LM's with the same documents."""
    for name, store in (("m_text_document", corpus.train), ("v", corpus.validation)):
        foreign(store, tmp_path / name)
    return types.SimpleNamespace(train="store:m_text_document", validation="store:v", tokenizer="tokenizer.json", cache="cache")


def beside(tmp_path):
    return {path.name for path in tmp_path.iterdir()}


def test_a_foreign_store_is_the_text_that_it_was_made_from(stores, corpus, tmp_path):
    said, there = [], beside(tmp_path)
    found = prepare.load(stores, tmp_path, 300, noting(said))
    for ours, theirs in ((corpus.train, found.train), (corpus.validation, found.validation)):
        assert theirs.tokens.tolist() == ours.tokens.tolist()
        assert theirs.document_offsets().tolist() == ours.document_offsets().tolist()
    texts = list(documents.documents("val.jsonl", tmp_path))
    assert found.validation.num_bytes == sum(len(text.encode()) for text in texts) == corpus.validation.num_bytes
    assert said == ["decoding store:v to count its bytes", sum(map(len, texts))]
    for count in range(found.validation.num_tokens + 1):
        expected = prepare.leading_bytes(corpus.validation, corpus.tokenizer, count)
        assert prepare.leading_bytes(found.validation, found.tokenizer, count) == expected
    assert beside(tmp_path) == there, "nothing is written beside files of other programs"


def test_what_was_found_is_not_looked_for_again(stores, tmp_path):
    """Not even where the ids have changed, if size and modification time have not. With --rehash it is."""
    first = prepare.load(stores, tmp_path, 300)
    changed = (tmp_path / "m_text_document.bin").read_bytes()[::-1]
    status = (tmp_path / "m_text_document.bin").stat()
    (tmp_path / "m_text_document.bin").write_bytes(changed)
    os.utime(tmp_path / "m_text_document.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    said = []
    assert prepare.load(stores, tmp_path, 300, noting(said)).fingerprint == first.fingerprint and said == []
    with pytest.raises(Mistake, match=r"store:m_text_document|m_text_document: token id"):
        prepare.load(stores, tmp_path, 300, noting(said), time.time_ns())
    (tmp_path / "m_text_document.bin").write_bytes(bytes(len(changed)))
    again = prepare.load(stores, tmp_path, 300, noting(said), time.time_ns())
    assert again.fingerprint != first.fingerprint


def test_of_all_ranks_at_once_one_reads(stores, tmp_path, monkeypatch):
    """Threads stand for ranks: each opens the lock for itself. The one that reads takes long enough for the others to ask."""
    read, reads, said = TokenStore.read, [], []

    def slow(store):
        reads.append(store.prefix.name)
        time.sleep(0.1)
        return read(store)

    monkeypatch.setattr(TokenStore, "read", slow)
    with ThreadPoolExecutor(4) as ranks:
        found = [*ranks.map(lambda rank: prepare.load(stores, tmp_path, 300, noting(said)).fingerprint, range(4))]
    assert sorted(reads) == ["m_text_document", "v"] and len(set(found)) == 1
    assert [word for word in said if "decoding" in str(word)] == ["decoding store:v to count its bytes"]


def test_a_text_is_not_read_at_the_second_start(settings, tmp_path):
    first = prepare.load(settings, tmp_path, 300)
    rewrite(tmp_path / "train.jsonl", "x" * (tmp_path / "train.jsonl").stat().st_size)
    assert prepare.load(settings, tmp_path, 300).fingerprint == first.fingerprint
    with pytest.raises(Mistake, match="line 1 is not JSON"):
        prepare.load(settings, tmp_path, 300, silent, time.time_ns())


def test_the_fingerprint_depends_on_content_alone(stores, settings, tmp_path):
    """That of texts is what it always was, so that older runs can be resumed."""
    first = prepare.load(stores, tmp_path, 300).fingerprint
    for path in tmp_path.glob("m_text_document.*"):
        shutil.copy(path, tmp_path / f"copied{path.suffix}")
    copied = types.SimpleNamespace(**vars(stores) | {"train": f"store:{tmp_path / 'copied'}", "cache": "other"})
    assert prepare.load(copied, tmp_path, 300).fingerprint == first
    texts = prepare.load(settings, tmp_path, 300)
    digests = [documents.digest(spec, tmp_path) for spec in (settings.train, settings.validation)]
    assert texts.fingerprint == joined(*digests, texts.tokenizer.fingerprint)


def own(tmp_path, corpus, name="own", **facts):
    made = {"tokenizer": "tok", "tokenizer_sha256": tokenizer_file.load("tokenizer.json", tmp_path).fingerprint} | facts
    with StoreWriter(tmp_path / name, 300, made) as writer:
        writer.add_documents(corpus.train.tokens, np.diff(corpus.train.document_offsets()), corpus.train.num_bytes)
    return f"store:{name}"


def test_a_store_of_our_own_is_not_even_read_once(stores, corpus, tmp_path):
    stores.train = stores.validation = own(tmp_path, corpus)
    found = prepare.load(stores, tmp_path, 300)
    assert found.validation.num_bytes == corpus.train.num_bytes and not list((tmp_path / "cache").glob("store-own*"))
    assert found.train.facts["max_id"] == corpus.train.tokens.max()
    with pytest.raises(Mistake, match="has the same content as data.train"):
        prepare.refuse_same_text(stores, found)


def test_a_store_that_was_made_with_another_tokenizer_is_refused_with_both(stores, corpus, tmp_path):
    stores.train = own(tmp_path, corpus, tokenizer="builtin:gpt2", tokenizer_sha256="ab" * 32)
    right = tokenizer_file.load("tokenizer.json", tmp_path).fingerprint[:16]
    said = rf"made with the tokenizer 'builtin:gpt2' .*{'ab' * 8}.*'tokenizer.json' is another .*{right}.* → name .*: .*tokenizer.json$"
    with pytest.raises(Mistake, match=said):
        prepare.load(stores, tmp_path, 300)


def test_files_that_are_not_those_of_their_sidecar_are_refused(stores, corpus, tmp_path):
    """The .bin is newer than the PREFIX.json, so that it is read: and read whole, not as the sidecar says."""
    stores.train = own(tmp_path, corpus)
    tokens = np.fromfile(tmp_path / "own.bin", "<u2")
    tokens[5] = 1 if tokens[5] != 1 else 2
    tokens.tofile(tmp_path / "own.bin")
    os.utime(tmp_path / "own.bin", ns=(time.time_ns() + 10**9,) * 2)
    with pytest.raises(Mistake, match=r"store:own: .*own.json says bin_sha256 .* they have changed since they were written → prepare"):
        prepare.load(stores, tmp_path, 300)


def test_a_damaged_store_in_the_cache_is_made_again(settings, tmp_path):
    first = prepare.load(settings, tmp_path, 300).train
    whole, path = first.tokens.tolist(), Path(f"{first.prefix}.bin")
    np.zeros(len(whole), "<u2").tofile(path)
    os.utime(path, ns=(time.time_ns() + 10**9,) * 2)
    assert prepare.load(settings, tmp_path, 300).train.tokens.tolist() == whole


def test_a_json_of_that_name_that_is_no_sidecar_is_passed_over(stores, corpus, tmp_path):
    for text in ('{"text": "a line of the corpus"}\n{"text": "another"}\n', '{"documents": 3, "tokens": 5, "bytes": 7}', "[]"):
        (tmp_path / "v.json").write_text(text)
        assert prepare.load(stores, tmp_path, 300).validation.num_bytes == corpus.validation.num_bytes


@pytest.mark.parametrize(("name", "value"), [("max_id", "7"), ("bytes", None), ("bin_sha256", 5), ("tokenizer_sha256", [])])
def test_a_sidecar_with_a_value_of_another_kind_is_passed_over(stores, corpus, tmp_path, name, value):
    stores.train = own(tmp_path, corpus)
    table = json.loads((tmp_path / "own.json").read_text())
    (tmp_path / "own.json").write_text(json.dumps(table | {name: value}))
    assert prepare.load(stores, tmp_path, 300).train.facts["max_id"] == corpus.train.tokens.max()


def test_ids_that_model_or_tokenizer_do_not_have_are_named(stores, tmp_path):
    megatron_files.write(tmp_path / "m_text_document", [[[1, 2, 0]], [[5, 320, 0]]], 8, "<u2")
    with pytest.raises(Mistake, match=r"token id 320 of document 1 at offset 1 is not below the tokens of data.tokenizer .* → name the"):
        prepare.load(stores, tmp_path, 400)
    megatron_files.write(tmp_path / "m_text_document", [[[1, 2, 0]], [[5, -3, 0]]], 4, "<i4")
    with pytest.raises(Mistake, match=r"token id -3 of document 1 at offset 1 .* → prepare it again"):
        prepare.load(stores, tmp_path, 400)


def test_a_store_has_no_text_to_train_a_tokenizer_on(stores, tmp_path):
    stores.tokenizer = "builtin:bpe-300"
    for refuse in (prepare.check, prepare.load):
        with pytest.raises(
            Mistake, match=r"'builtin:bpe-300' is trained on a text, and data.train = 'store:m_text_document' has only tokens → "
        ):
            refuse(stores, tmp_path, 300)


def test_a_store_that_is_not_there_is_refused_before_anything_is_read(stores, tmp_path):
    for name, words in (
        ("store:m", r"data.train = 'store:m': .*m.idx does not exist → is store:m_text_document meant\?"),
        ("store:nowhere/x", "data.train = 'store:nowhere/x': .* does not exist → name what stands before .bin and .idx"),
        ("store:v.bin", r"data.train = 'store:v.bin': .* does not exist → is store:v meant\?"),
    ):
        stores.train = name
        with pytest.raises(Mistake, match=words):
            prepare.check(stores, tmp_path, 300)
    (tmp_path / "v.bin").write_bytes(b"123")
    with pytest.raises(Mistake, match=r"data.validation = 'store:v': .*v.bin has 3 bytes, its index promises"):
        prepare.check(types.SimpleNamespace(**vars(stores) | {"train": "store:m_text_document"}), tmp_path, 300)


def test_one_store_gives_both_parts(stores, corpus, tmp_path):
    stores.validation = "split:7,2,1"
    found = prepare.load(stores, tmp_path, 300)
    tokens, offsets = corpus.train.tokens, corpus.train.document_offsets()
    assert found.train.tokens.tolist() == tokens[: offsets[14]].tolist()
    assert found.validation.tokens.tolist() == tokens[offsets[14] : offsets[18]].tolist()
    texts = list(documents.documents("train.jsonl", tmp_path))
    assert found.validation.num_bytes == sum(len(text.encode()) for text in texts[14:18])
    prepare.refuse_same_text(stores, found)
    held_out = prepare.held_out_stores(stores, stores.validation, tmp_path, found.tokenizer)[0]
    assert held_out.tokens.tolist() == found.validation.tokens.tolist() and held_out.num_bytes == found.validation.num_bytes
    prints = {found.fingerprint}
    for split in ("split:7,3", "split:7,1,2"):
        stores.validation = split
        prints.add(prepare.load(stores, tmp_path, 300).fingerprint)
    assert len(prints) == 3


def test_one_text_gives_both_parts(settings, corpus, tmp_path):
    settings.validation, settings.tokenizer = "split:0.1", "tokenizer.json"
    found = prepare.load(settings, tmp_path, 300)
    texts = list(documents.documents("train.jsonl", tmp_path))
    cut = [found.tokenizer.decode(found.validation.tokens[begin : end - 1]) for begin, end in found.validation.documents()]
    assert cut == texts[18:] and found.train.num_documents == 18
    assert found.validation.num_bytes == sum(len(text.encode()) for text in texts[18:])


def test_a_tokenizer_is_trained_on_the_training_part_alone(settings, tmp_path, lines):
    texts = list(documents.documents("train.jsonl", tmp_path))
    settings.validation = "split:0.3"
    found, again = (prepare.load(settings, tmp_path, 300).tokenizer for _ in range(2))
    settings.train, settings.validation = lines("part.jsonl", texts[:14]), "val.jsonl"
    assert found.fingerprint == again.fingerprint == prepare.load(settings, tmp_path, 300).tokenizer.fingerprint
    settings.train = "train.jsonl"
    assert prepare.load(settings, tmp_path, 300).tokenizer.fingerprint != found.fingerprint


TOKENS, DOCUMENTS = 10**9, 10**5


def sparse(prefix: Path) -> None:
    """A store of 10⁹ tokens in 10⁵ documents, whose .bin is one hole, with the sidecar of our own writer."""
    lengths = np.full(DOCUMENTS, TOKENS // DOCUMENTS)
    index = struct.pack("<9sQBQQ", megatron_files.MAGIC, 1, 8, DOCUMENTS, DOCUMENTS + 1) + lengths.astype("<i4").tobytes()
    index += (2 * lengths[0] * np.arange(DOCUMENTS)).astype("<i8").tobytes() + np.arange(DOCUMENTS + 1, dtype="<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(index)
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(2 * TOKENS)
    facts = {"documents": DOCUMENTS, "tokens": TOKENS, "bytes": TOKENS, "max_id": 0, "bin_sha256": "b" * 64, "idx_sha256": "i" * 64}
    Path(f"{prefix}.json").write_text(json.dumps(facts))


def resident_bytes(array: np.ndarray) -> int:
    """How much of a memory-mapped file is in memory (mincore(2)), whoever read it."""
    address, size = array.__array_interface__["data"][0], array.nbytes
    pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
    seen = (ctypes.c_ubyte * pages)()
    assert ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), seen) == 0
    return mmap.PAGESIZE * int((np.frombuffer(seen, np.uint8) & 1).sum())


def read_bytes() -> int:
    """Bytes that this process has read with system calls."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_opening_a_store_of_a_billion_tokens_reads_next_to_nothing(stores, tmp_path):
    """Neither by system calls nor by touching pages: of 2 GB and an index of 2 MB, less than a megabyte."""
    sparse(tmp_path / "big")
    stores.train = "store:big"
    prepare.load(stores, tmp_path, 300)
    before = read_bytes()
    found = prepare.load(stores, tmp_path, 300)
    assert found.train.num_tokens == TOKENS and read_bytes() - before < 10**6
    assert found.train.document_at(TOKENS - 1) == DOCUMENTS - 1
    assert resident_bytes(found.train.tokens) < 10**6
    assert int(found.train.tokens[TOKENS // 2 : TOKENS // 2 + 10**6].max()) == 0
    assert resident_bytes(found.train.tokens) > 10**6, "reading is seen"


def test_the_digest_of_a_text_of_a_task(stores, settings, tmp_path):
    for spec in (settings.train, "store:v", "split:7,2,1"):
        assert len(prepare.digest(stores, spec, tmp_path)) == 64
    assert prepare.digest(stores, settings.train, tmp_path) == documents.digest(settings.train, tmp_path)
    cache = Cache(tmp_path / "cache", silent)
    assert prepare.digest(stores, "store:v", tmp_path) == token_stores.digest("store:v", tmp_path, cache)
