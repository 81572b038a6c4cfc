"""Supervised examples: masks against characters, packed rows against documents one by one, and a mask that is not that of its store."""

import dataclasses
import os
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as given_settings
from hypothesis import strategies as st
from tokenizers import processors

from parallel.errors import Mistake
from research.config.examples import Supervised
from research.data import tokenizer
from research.data.conversations import Conversation, PlainForm
from research.data.mask_store import MaskWriter, TokenMask
from research.data.rendered_text import ExampleEncoder, RenderedText
from research.data.supervised import SupervisedExamples
from research.data.token_store import StoreWriter, TokenStore

BPE = tokenizer.from_json("builtin:bpe-400", tokenizer.train_bpe(["the people of the union are the people 猫 of élan\n\n " * 20], 400))
BYTES = tokenizer.fixed(tokenizer.BYTES)
TEXT = st.text(st.sampled_from("the people of union 猫é½🎉\n .<|endoftext|>"), max_size=30)
LETTERS = {letter: byte for byte, letter in enumerate(tokenizer.BYTE_LETTERS)}


def bytes_of(token: int) -> int:
    """The number of bytes of a token of a byte-level BPE."""
    return len(BPE.backend.id_to_token(token))


@given(st.lists(TEXT.filter(bool), min_size=2, max_size=7), st.booleans())
@given_settings(max_examples=150, deadline=None)
def test_a_token_counts_if_it_has_a_byte_of_a_response(texts, first):
    """The spans are every other text. Bytes of tokens are counted by their names in the vocabulary, not by the library's offsets."""
    whole, borders = "".join(texts), list(accumulate(map(len, texts), initial=0))
    spans = [span for i, span in enumerate(pairwise(borders)) if i % 2 == first]
    [(ids, mask)] = ExampleEncoder(BPE).encode_arrays([RenderedText("", ((whole, True),), tuple(spans))])
    assert ids.tolist() == BPE.encode(whole)
    counted = [i % 2 == first for i, text in enumerate(texts) for _ in text.encode()]
    ends = list(accumulate(map(bytes_of, ids.tolist()), initial=0))
    assert ends[-1] == len(counted)
    assert mask.tolist() == [int(any(counted[begin:end])) for begin, end in pairwise(ends)]


def test_white_space_counts_whatever_the_tokenizer_s_file_says_of_offsets():
    """GPT-2's own file has a post-processor that takes white space out of the offsets."""
    backend = type(BPE.backend).from_str(BPE.backend.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    text, spans = "a\n\nthe  people\n", ((1, 3), (6, 8), (14, 15))
    [(ids, mask)] = ExampleEncoder(dataclasses.replace(BPE, backend=backend)).encode_arrays([RenderedText("", ((text, True),), spans)])
    assert BPE.decode(ids[mask == 1]) == "\n\n  people\n" and ids.tolist() == BPE.encode(text)


def told(messages: list[tuple[str, str]], is_pair: bool = False) -> Conversation:
    return Conversation("a.jsonl, line 1", [{"role": role, "content": text} for role, text in messages], is_pair)


@given(TEXT, TEXT.filter(str.strip))
@given_settings(max_examples=60, deadline=None)
def test_a_prompt_and_a_response_are_what_they_are(prompt, response):
    [(ids, mask)] = ExampleEncoder(BYTES).encode_arrays([PlainForm().render(told([("user", prompt), ("assistant", response)], True))])
    begin = [] if prompt else [BYTES.end_of_text]  # as Tokenizer.prompt, so that the response's first byte is predicted
    assert ids.tolist() == [*begin, *prompt.encode(), *response.encode(), BYTES.end_of_text]
    assert mask.tolist() == [0] * len(begin + [*prompt.encode()]) + [1] * (len(response.encode()) + 1)


def test_messages_without_a_template_are_the_server_s_lines():
    said = told([("system", "Be kind. "), ("user", "war?"), ("assistant", " no"), ("user", "why"), ("assistant", "peace<|endoftext|>")])
    [(ids, mask)] = ExampleEncoder(BYTES).encode_arrays([PlainForm().render(said)])
    text = "Be kind.\nUser: war?\nAssistant: no\nUser: why\nAssistant: peace<|endoftext|>"
    assert ids.tolist() == [*text.encode(), BYTES.end_of_text]
    counted = bytes(i if counts else ord("_") for i, counts in zip(ids[:-1].tolist(), mask[:-1].tolist(), strict=True))
    answers = text.replace("Be kind.\nUser: war?\nAssistant:", "_" * 30).replace(" why\nAssistant:", "_" * 15)
    assert counted.decode() == answers and mask[-1] == 1
    two = told([("user", "a"), ("assistant", "b"), ("assistant", "c"), ("user", "d")])
    [(ids, mask)] = ExampleEncoder(BYTES).encode_arrays([PlainForm().render(two)])
    assert bytes(ids.tolist()).decode() == "User: a\nAssistant: b\nAssistant: c\nUser: d"
    assert bytes(ids[mask == 1].tolist()).decode() == " b c\nUser:"


def store_of(folder, documents) -> TokenStore:
    """A store of (ids, mask) of each document."""
    with StoreWriter(folder / "chats", 1000, {}) as writer, MaskWriter(folder / "chats", writer.facts) as masks:
        for ids, mask in documents:
            writer.add(np.array(ids), len(ids))
            masks.add_documents(np.array(mask, np.uint8), np.array([len(ids)]))
    return TokenStore(folder / "chats")


DOCUMENTS = st.lists(
    st.lists(st.tuples(st.integers(0, 999), st.booleans()), min_size=1, max_size=14), min_size=1, max_size=25
)  # fmt: skip


EPOCHS = given(DOCUMENTS, st.integers(1, 20), st.sampled_from(["responses", "all"]), st.data())


@EPOCHS
@given_settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_are_the_documents_one_by_one(tmp_path, documents, length, train_on, data):
    check_rows(tmp_path, documents, length, train_on, data)


@pytest.mark.slow
@EPOCHS
@given_settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_of_many_more_stores_are_the_documents_one_by_one(tmp_path, documents, length, train_on, data):
    check_rows(tmp_path, documents, length, train_on, data)


def check_rows(tmp_path, documents, length, train_on, data):
    """Each document that has a token to learn within the length is once in an epoch, in a segment of its own, whatever rows are read."""
    store = store_of(tmp_path, [([i for i, _ in document], [counts for _, counts in document]) for document in documents])
    expected, left_out, truncated = [], 0, 0
    for document in documents:
        pairs = [(before, after, train_on == "all" or counts) for (before, _), (after, counts) in pairwise(document)]
        truncated += len(pairs) > length
        if any(counts for *_, counts in pairs[:length]):
            expected.append(pairs[:length])
        else:
            left_out += 1
    if not expected:
        with pytest.raises(Mistake, match="has a token of a response among its first"):
            SupervisedExamples(store, BYTES, length, 0, train_on=train_on)
        return
    found = SupervisedExamples(store, BYTES, length, 0, train_on=train_on)
    assert (found.num_left_out, found.num_truncated) == (left_out, truncated)
    assert (f"{left_out} left out" in found.summary, f"{truncated} longer than" in found.summary) == (left_out > 0, truncated > 0)
    numbers = np.array(data.draw(st.permutations(range(found.size))))
    rows, counted = found.rows(numbers, 0 * numbers), found.counted(numbers, 0 * numbers)
    assert rows.ids.shape == rows.targets.shape == rows.counts.shape == rows.segments.shape == (found.size, length)
    seen = []
    for row, number in enumerate(numbers.tolist()):
        columns = [column[row].tolist() for column in (rows.ids, rows.targets, rows.counts)]
        segments = rows.segments[row].tolist()
        there = [place for place in range(length) if segments[place] >= 0]
        assert there == list(range(len(there))) and segments[: len(there)] == sorted(segments[: len(there)])
        assert not any(columns[2][len(there) :]) and len(set(segments[len(there) :])) <= 1
        assert counted[row] == sum(columns[2])
        stretches = found.stretches(number, 0)
        for segment, (start, stop) in zip(sorted({segments[place] for place in there}), stretches, strict=True):
            places = [place for place in there if segments[place] == segment]
            seen.append([tuple(column[place] for column in columns) for place in places])
            assert store.tokens[start:stop].tolist() == [seen[-1][0][0], *(target for _, target, _ in seen[-1])]
    assert sorted(seen) == sorted(expected)
    assert found.fill == pytest.approx(sum(map(len, expected)) / (found.size * length))


def test_a_mask_that_is_not_that_of_its_store_is_refused(tmp_path):
    documents = [([1, 2, 3], [0, 1, 1]), ([4], [0]), ([5, 6], [0, 1])]
    store = store_of(tmp_path, documents)
    mask = TokenMask(store)
    assert mask.values.tolist() == [0, 1, 1, 0, 0, 1] and mask.sums.tolist() == [0, 2, 2, 3]
    assert store.facts["mask_sum"] == 3
    second = TokenMask(store.part(1, 3))
    assert second.values.tolist() == [0, 0, 1] and np.diff(second.sums).tolist() == [0, 1]
    path, sums = tmp_path / "chats.mask.bin", tmp_path / "chats.mask.sums"
    for file, raw in ((path, b"\1\1\0\0\0\1"), (path, b"\1"), (sums, sums.read_bytes()[:-8]), (sums, sums.read_bytes()[:-1] + b"\1")):
        whole, state = file.read_bytes(), file.stat()
        file.write_bytes(raw)  # newer than PREFIX.json
        with pytest.raises(Mistake, match="is not the mask of"):
            TokenMask(store)
        file.write_bytes(whole)
        os.utime(file, ns=(state.st_mtime_ns, state.st_mtime_ns))
        TokenMask(store)
    os.utime(path)  # touched, but what PREFIX.json tells of
    TokenMask(store)
    sums.unlink()
    with pytest.raises(Mistake, match=r"has no \.mask\.bin and \.mask\.sums"):
        SupervisedExamples(store, BYTES, 4, 0)


def test_an_error_leaves_no_mask(tmp_path):
    with pytest.raises(ValueError, match="stop"), MaskWriter(tmp_path / "chats", {}) as masks:
        masks.add_documents(np.ones(2, np.uint8), np.array([2]))
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def test_the_settings_say_what_counts():
    assert Supervised(train_on="all").kind == "supervised"
    for wrong in ({}, {"train_on": "answers"}, {"train_on": "all", "rate": 1}):
        with pytest.raises(Mistake):
            Supervised(**wrong)
