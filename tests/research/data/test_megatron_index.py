"""Stores of Megatron-LM, Megatron-DeepSpeed, GPT-NeoX and DeepSpeed, made by hand here, are read; what is no store of ids is refused."""

import struct

import numpy as np
import pytest

from parallel.errors import Mistake
from research.data import megatron_index, token_store
from research.data.token_store import StoreWriter, TokenStore
from tests.research.helpers import megatron_files

DOCUMENTS = [[[5, 6], [7, 0]], [], [[100]], [[1, 2, 3, 4, 5]]]
"""Of two sequences, of none, and of one."""


def all_codes():
    tables = {
        "Megatron-LM": megatron_files.MEGATRON_LM,
        "Megatron-DeepSpeed": megatron_files.MEGATRON_DEEPSPEED,
        "DeepSpeed": megatron_files.DEEPSPEED,
    }
    return [pytest.param(code, dtype, id=f"{name} {code}") for name, table in tables.items() for code, dtype in table.items()]


@pytest.mark.parametrize(("code", "dtype"), all_codes())
def test_every_type_code_is_read_or_refused_by_name(tmp_path, code, dtype):
    megatron_files.write(tmp_path / "m", DOCUMENTS, code, dtype)
    if "f" in dtype or dtype == "<u4":
        words = "float32 in Megatron-LM and uint32 in DeepSpeed" if dtype.endswith("4") else "float64"
        with pytest.raises(
            Mistake, match=rf"m.idx has type code {code}, and .*m.bin {dtype[-1]} bytes per token: that is {words}.* → write"
        ):
            TokenStore(tmp_path / "m")
        return
    found = TokenStore(tmp_path / "m")
    assert found.tokens.dtype == np.dtype(dtype) and found.tokens.tolist() == [5, 6, 7, 0, 100, 1, 2, 3, 4, 5]
    assert found.document_offsets().tolist() == [0, 4, 4, 5, 10] and found.num_documents == 4
    assert found.read()["max_id"] == 100 and found.facts == {}


def test_the_mode_array_of_a_multimodal_store_is_passed_over(tmp_path):
    megatron_files.write(tmp_path / "m", DOCUMENTS, 8, "<u2", modes=[0, 1, 0, 1])
    assert TokenStore(tmp_path / "m").document_offsets().tolist() == [0, 4, 4, 5, 10]


def test_an_empty_sequence_at_the_end_does_not_hide_the_type(tmp_path):
    megatron_files.write(tmp_path / "m", [[[5, 6], []], [[]]], 8, "<u8")
    assert TokenStore(tmp_path / "m").tokens.tolist() == [5, 6]


def test_what_is_written_here_is_read_by_the_reader_of_the_format(tmp_path):
    for vocab_size in (65499, 65500):
        with StoreWriter(tmp_path / "s", vocab_size, {}) as writer:
            writer.add(np.array([5, 6, vocab_size - 1]), 3)
            writer.add_documents(np.array([0, 1, 0]), np.array([1, 2]), 1)
        assert megatron_files.read(tmp_path / "s") == [[[5, 6, vocab_size - 1]], [[0]], [[1, 0]]]


@pytest.mark.slow
def test_deepspeeds_own_reader_and_writer(tmp_path):
    """Its reader reads our int32; its writer's files are read here, with its codes for unsigned integers. uint16 means 8 to us, 6 to it."""
    from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDataset, MMapIndexedDatasetBuilder

    with StoreWriter(tmp_path / "ours", 100_000, {}) as writer:
        writer.add_documents(np.array([5, 6, 70_000, 0, 1, 0]), np.array([4, 2]), 1)
    found = MMapIndexedDataset(str(tmp_path / "ours"), skip_warmup=True)
    assert [found[i].tolist() for i in range(len(found))] == [[5, 6, 70_000, 0], [1, 0]] and found.doc_idx.tolist() == [0, 1, 2]

    for dtype in (np.uint8, np.int16, np.int32, np.int64, np.uint16, np.uint64):
        builder = MMapIndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype)
        for document in DOCUMENTS:
            for sequence in document:
                builder.add_item_numpy(np.array(sequence, dtype))
            builder.end_document()
        builder.finalize(str(tmp_path / "theirs.idx"))
        store = TokenStore(tmp_path / "theirs")
        assert store.tokens.dtype == dtype and store.tokens.tolist() == [5, 6, 7, 0, 100, 1, 2, 3, 4, 5]
        assert store.document_offsets().tolist() == [0, 4, 4, 5, 10]


def test_the_document_of_a_position(tmp_path):
    megatron_files.write(tmp_path / "m", DOCUMENTS, 4, "<i4")
    found = TokenStore(tmp_path / "m")
    assert [found.document_at(position) for position in range(10)] == [0, 0, 0, 0, 2, 3, 3, 3, 3, 3]
    assert list(found.documents()) == [(0, 4), (4, 4), (4, 5), (5, 10)]
    part = found.part(2, 4)
    assert part.tokens.tolist() == [100, 1, 2, 3, 4, 5] and part.document_offsets().tolist() == [0, 1, 6]
    assert [part.document_at(position) for position in range(6)] == [0, 1, 1, 1, 1, 1]
    again = part.part(1, 2)
    assert again.tokens.tolist() == [1, 2, 3, 4, 5] and again.facts["first_document"] == 3


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda index: b"TNTIDX\0\0" + index[8:], ["older kind (TNTIDX)", "--dataset-impl mmap"]),
        (lambda index: index[:20], ["MMIDIDX", "only 20 bytes"]),
        (lambda index: index[:17] + b"\x09" + index[18:], ["type code 9", "1, 2, 3, 4, 5, 6, 7 or 8"]),
        (lambda index: index[:-1], ["cut short", "has 121 bytes", "need 122 (126"]),
        (lambda index: index + b"\0", ["too long", "has 123 bytes", "need 122"]),
        (lambda index: index[:114] + struct.pack("<q", 9), ["do not cover the 4 sequences"]),
        (lambda index: index[:90] + struct.pack("<q", 3) + index[98:], ["do not cover the 4 sequences"]),
        (lambda index: index[:34] + struct.pack("<ii", 1, 3) + index[42:], ["one after the other"]),
        (lambda index: index[:50] + struct.pack("<q", 2) + index[58:], ["one after the other"]),
    ],
)
def test_an_index_that_is_damaged_is_named(tmp_path, harm, words):
    megatron_files.write(tmp_path / "m", DOCUMENTS, 8, "<u2")
    path = tmp_path / "m.idx"
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(Mistake) as caught:
        TokenStore(tmp_path / "m")
    assert all(word in str(caught.value) for word in [*words, str(path), "→"]), str(caught.value)


def test_a_store_of_another_size_names_both(tmp_path):
    megatron_files.write(tmp_path / "m", DOCUMENTS, 8, "<u2")
    (tmp_path / "m.bin").write_bytes(bytes(19))
    with pytest.raises(Mistake, match=r"m.bin has 19 bytes, its index promises 10 tokens = 20 bytes → copy"):
        TokenStore(tmp_path / "m")
    megatron_files.write(tmp_path / "one", [[[1, 2, 3]]], 8, "<u2")
    (tmp_path / "one.bin").write_bytes(bytes(8))
    with pytest.raises(Mistake, match=r"one.bin has 8 bytes, its index promises 3 tokens = 6 bytes or 3 tokens = 24 bytes → copy"):
        TokenStore(tmp_path / "one")
    (tmp_path / "m.bin").unlink()
    with pytest.raises(Mistake, match=r"m.bin is missing, and .*m.idx is there"):
        TokenStore(tmp_path / "m")
    megatron_files.write(tmp_path / "none", [[], []], 8, "<u2")
    with pytest.raises(Mistake, match=r"none.idx has 0 sequences without a token"):
        TokenStore(tmp_path / "none")


def test_what_opening_leaves_out_is_found_by_reading(tmp_path, monkeypatch):
    """Opening checks only so many sequences and documents."""
    monkeypatch.setattr(megatron_index, "AT_OPENING", 2)
    monkeypatch.setattr(megatron_index, "CHUNK", 3)
    monkeypatch.setattr(token_store, "CHUNK", 3)
    documents = [*DOCUMENTS, [[9]]]
    for at, raw, words in ((34 + 8, struct.pack("<2i", 2, 4), "one after the other"), (34 + 60 + 24, struct.pack("<q", 5), "cover")):
        megatron_files.write(tmp_path / "m", documents, 8, "<u2")
        TokenStore(tmp_path / "m").read()
        index = (tmp_path / "m.idx").read_bytes()
        (tmp_path / "m.idx").write_bytes(index[:at] + raw + index[at + len(raw) :])
        with pytest.raises(Mistake, match=words):
            TokenStore(tmp_path / "m").read()
