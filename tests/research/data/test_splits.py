"""Splits: Megatron-LM's rule, computed here a second time, and what leaves a part without a document."""

import re
import types

import numpy as np
import pytest

from parallel.errors import Mistake
from research.data import prepare, splits, tokenizer
from research.data.token_store import TokenStore
from tests.research.helpers import megatron_files


def by_megatron(split: str, documents: int) -> list[tuple[int, int]]:
    """The rule in megatron/core/datasets: shares are normalised, summed one after the other, multiplied by the documents, rounded."""
    weights = np.array([float(word) for word in re.findall(r"[.0-9]+", split)], np.float64)
    ends, total = [0.0], 0.0
    for weight in (weights / np.sum(weights)).tolist():
        total += weight
        ends.append(total)
    rounded = [int(round(end * float(documents))) for end in ends]
    return list(zip(rounded, rounded[1:], strict=False))


@pytest.mark.parametrize("split", ["969,30,1", "98,1,1", "1,1,1", "0.7,0.2,0.1", "949,50,1", "1, 2, 4", "99,1"])
def test_the_borders_are_those_of_megatron(split):
    for documents in [*range(1, 400), 12345, 10**6 + 3, 10**9 + 7]:
        found = splits.borders(f"split:{split}", documents)
        parts = [(begin, end) for begin, end in zip(found, found[1:], strict=False)]
        assert parts[: split.count(",") + 1] == by_megatron(split, documents) and found[-1] == documents


def test_one_number_is_the_part_at_the_end():
    assert splits.borders("split:0.05", 40) == [0, 38, 40, 40]


def store(tmp_path, documents):
    megatron_files.write(tmp_path / "m", [[[i, i, 0]] for i in range(documents)], 8, "<u2")
    return TokenStore(tmp_path / "m")


def test_the_parts_are_whole_documents_and_all_of_them(tmp_path):
    parts = splits.split(store(tmp_path, 10), "split:7,2,1", "store:m")
    assert [part.tokens[::3].tolist() for part in parts] == [[0, 1, 2, 3, 4, 5, 6], [7, 8], [9]]
    assert [part.num_documents for part in parts] == [7, 2, 1]


def test_one_document_is_split_by_position(tmp_path):
    """A text file in an experiment: the parts follow one another, know their bytes, and are not taken for one another."""
    text = "".join(f"{i} état, " for i in range(500))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = {}
    for split in ("split:0.05", "split:80,20"):
        data = types.SimpleNamespace(train="a.txt", validation=split, tokenizer="builtin:bytes", cache="cache")
        found[split] = corpus = prepare.load(data, tmp_path, 257)
        tokens, share = len(text.encode()) + 1, 0.95 if split == "split:0.05" else 0.8
        parts = [corpus.train.tokens.tolist(), corpus.validation.tokens.tolist()]
        assert sum(parts, []) == [*text.encode(), 256] and len(parts[0]) == round(share * tokens)
        assert [store.document_offsets().tolist() for store in (corpus.train, corpus.validation)] == [[0, len(part)] for part in parts]
        assert corpus.validation.num_bytes == len(bytes(parts[1][:-1]).decode(errors="replace").encode())
        assert prepare.held_out_texts(corpus, 100)[0].num_bytes == len(bytes(parts[1][:101]).decode(errors="ignore").encode())
    digests = {store.facts["source_sha256"] for corpus in found.values() for store in (corpus.train, corpus.validation)}
    assert len(digests) == 4 and found["split:0.05"].fingerprint != found["split:80,20"].fingerprint


def test_characters_are_taken_from_all_parts_and_bpe_from_the_first(tmp_path):
    (tmp_path / "a.txt").write_text("ab " * 500 + "cd " * 500)
    data = types.SimpleNamespace(train="a.txt", validation="split:0.5", tokenizer="builtin:chars", cache="cache")
    assert prepare.load(data, tmp_path, 300).tokenizer.vocab_size == 6
    data.tokenizer = "builtin:bpe-300"
    found, whole = prepare.load(data, tmp_path, 300).tokenizer, tokenizer.train_bpe(["ab " * 500], 300)
    assert found.fingerprint == tokenizer.from_json("builtin:bpe-300", whole).fingerprint


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("split:99,1", ["no document to the validation part", "'store:m' has 3 documents", "3, 0 and 0", "larger share, or"]),
        ("split:60,39,1", ["no document to the test part", "become 2, 1 and 0", "larger share or none, or"]),
        ("split:1,99", ["no document to the training part", "become 0, 3 and 0"]),
    ],
)
def test_a_part_without_a_document_is_refused_with_numbers(tmp_path, split, words):
    with pytest.raises(Mistake) as caught:
        splits.split(store(tmp_path, 3), split, "store:m")
    assert all(word in str(caught.value) for word in [split, *words]), str(caught.value)


@pytest.mark.parametrize(
    "split", ["split:", "split:a,b", "split:1", "split:0", "split:-1,2", "split:1,2,3,4", "split:nan,1", "split:inf,1"]
)
def test_what_is_no_split_is_refused(split):
    with pytest.raises(Mistake, match=r"is not two or three shares, or one between 0 and 1 → write 'split:969,30,1'"):
        splits.shares(split)


def test_a_split_without_one_of_the_first_two_parts_is_refused():
    for split, part in (("split:0,1,1", "training"), ("split:1,0,1", "validation")):
        with pytest.raises(Mistake, match=f"gives the {part} part nothing"):
            splits.shares(split)


def test_a_part_shorter_than_a_sample_is_refused(tmp_path):
    train, validation, _ = splits.split(store(tmp_path, 10), "split:9,1", "store:m")
    splits.refuse_short("split:9,1", train, validation, 2)
    with pytest.raises(Mistake, match=r"leaves 3 tokens to the validation part, a sample of model.seq_length = 3 needs 4 → give"):
        splits.refuse_short("split:9,1", train, validation, 3)
    with pytest.raises(Mistake, match=r"leaves 27 tokens to the training part"):
        splits.refuse_short("split:9,1", train, validation, 27)
