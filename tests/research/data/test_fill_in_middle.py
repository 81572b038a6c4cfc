"""Fill in the middle: a rearranged document decodes to itself, nothing is lost or mixed, and the shares are those of the rates."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import Mistake
from research.config.examples import FillInMiddle
from research.data import special_tokens, tokenizer
from research.data.fill_in_middle import FillInMiddleExamples, sentinels_of
from research.data.token_store import TokenStore, write
from tests.research.helpers.example import sentence

TEXT = "the cat — über 猫 and 🎉 <fim_middle> sat\n\tdef f(x):\n    return x  # élan\n" * 20
CHARACTERS = st.sampled_from("ab \n\t'sé猫🎉\u0301\u2028<>_") | st.characters(exclude_categories=["Cs"])
DOCUMENTS = st.lists(st.text(CHARACTERS, max_size=120), min_size=4, max_size=12)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = tokenizer.trained("builtin:bpe-320+fim", [TEXT], "digest", tmp_path_factory.mktemp("cache"))
    return {"bpe": made, "gpt2": tokenizer.fixed("builtin:gpt2+fim"), "bytes": tokenizer.fixed("builtin:bytes+fim")}


def store_of(folder, own, texts) -> TokenStore:
    documents = [np.array([*own.encode(text), own.end_of_text]) for text in texts]
    write(folder / "store", ((ids, 1) for ids in documents), own.vocab_size, {})
    return TokenStore(folder / "store")


def examples_of(store, own, seq_length, seed=3, **changes):
    given_settings = FillInMiddle(**{"rate": 1.0, "spm_rate": 0.5, "confine": True} | changes).model_dump(exclude={"kind"})
    return FillInMiddleExamples(store, own, seq_length, seed, **given_settings)


def pieces(row, own):
    """The tokens of a row between its end-of-texts."""
    borders = [-1, *np.flatnonzero(row == own.end_of_text).tolist(), len(row)]
    return [row[first + 1 : last].tolist() for first, last in itertools.pairwise(borders)]


def restored(piece, own, sentinels):
    """The bytes of the document's piece that was rearranged; of another piece its own."""
    if not piece or piece[0] != sentinels.prefix:
        return bytes_of(piece, own)
    suffix, middle = piece.index(sentinels.suffix), piece.index(sentinels.middle)
    assert sorted([0, suffix, middle]) == [0, suffix, middle] and sum(token in sentinels for token in piece) == 3
    return bytes_of(piece[1:suffix], own) + bytes_of(piece[middle + 1 :], own) + bytes_of(piece[suffix + 1 : middle], own)


def bytes_of(ids, own):
    """By the letters of each token, which stand for bytes: no decoder is involved that could hide a character that is cut."""
    table = {letter: byte for byte, letter in enumerate(tokenizer.BYTE_LETTERS)}
    return bytes(table[letter] for token in ids for letter in own.backend.id_to_token(token))


SAMPLES = dict(texts=DOCUMENTS, seed=st.integers(0, 2**32 - 1), spm_rate=st.sampled_from([0.0, 0.5, 1.0]), seq_length=st.integers(24, 60))


@settings(max_examples=5, deadline=None)
@given(**SAMPLES)
def test_every_row_is_full_and_decodes_to_the_bytes_of_its_window(tokenizers, tmp_path_factory, texts, seed, spm_rate, seq_length):
    for name in ("bytes", "bpe"):
        check_rows(tokenizers[name], tmp_path_factory, texts, seed, spm_rate, seq_length)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bytes", "bpe", "gpt2"])
@settings(max_examples=150, deadline=None)
@given(**SAMPLES)
def test_many_rows_are_full_and_decode_to_the_bytes_of_their_windows(name, tokenizers, tmp_path_factory, texts, seed, spm_rate, seq_length):
    check_rows(tokenizers[name], tmp_path_factory, texts, seed, spm_rate, seq_length)


def check_rows(own, tmp_path_factory, texts, seed, spm_rate, seq_length):
    store = store_of(tmp_path_factory.mktemp("s"), own, [*texts, TEXT[:300]])
    one = examples_of(store, own, seq_length, seed, spm_rate=spm_rate)
    numbers = np.arange(one.size)
    rows = one.rows(numbers, numbers * 0)
    assert rows.ids.shape == rows.targets.shape == (one.size, seq_length) and (rows.ids[:, 1:] == rows.targets[:, :-1]).all()
    for number, ids, targets in zip(numbers.tolist(), rows.ids, rows.targets, strict=True):
        ((start, stop),) = one.stretches(number, 0)
        assert start == number * one.stride and start + one.stride + 1 <= stop <= start + seq_length + 1 <= store.num_tokens
        read = store.tokens[start:stop]
        found = [restored(piece, own, one.sentinels) for piece in pieces(np.append(ids, targets[-1]), own)]
        there = [bytes_of(piece, own) for piece in pieces(read, own)]
        if len(found) > len(there):  # an end-of-text was inserted where the window cuts a document that is rearranged
            cut = len(pieces(read[: one.stride + 1], own)) - 1
            found[cut : cut + 2] = [found[cut] + found[cut + 1]]
        assert found == there


def test_a_document_is_predicted_from_itself_alone(tokenizers, tmp_path):
    """Documents of one letter each: no segment of a confined row has letters of two."""
    own = tokenizers["bytes"]
    store = store_of(tmp_path, own, [letter * (5 + 7 * i % 40) for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz" * 3)])
    one = examples_of(store, own, 48)
    rows = one.rows(np.arange(one.size), np.zeros(one.size, int))
    for ids, targets, segments in zip(rows.ids, rows.targets, rows.segments, strict=True):
        for segment in np.unique(segments):
            letters = {*ids[segments == segment].tolist(), *targets[segments == segment].tolist()}
            assert len(letters - {own.end_of_text, *one.sentinels}) <= 1
    assert examples_of(store, own, 48, confine=False).rows(np.array([0]), np.array([0])).segments is None


def test_a_window_depends_on_its_number_and_epoch_alone(tokenizers, tmp_path):
    own = tokenizers["bpe"]
    store = store_of(tmp_path, own, [TEXT[i : i + 200] for i in range(0, 1000, 40)])
    one, numbers = examples_of(store, own, 64), np.arange(12)
    first, second = (one.rows(numbers, np.full(12, epoch)).ids for epoch in (0, 1))
    assert (first != second).any(1).mean() > 0.9
    mixed = examples_of(store, own, 64).rows(np.concatenate([numbers[::-1], numbers]), np.repeat([1, 0], 12)).ids
    assert (mixed[:12][::-1] == second).all() and (mixed[12:] == first).all()
    assert (examples_of(store, own, 64, seed=4).rows(numbers, numbers * 0).ids != first).any()


def test_without_a_rate_a_row_is_a_window_of_the_stream(tokenizers, tmp_path):
    own = tokenizers["bytes"]
    one = examples_of(store_of(tmp_path, own, [TEXT[:500]] * 3), own, 30, rate=0.0)
    assert (one.slack, one.stride, one.size) == (0, 30, (one.store.num_tokens - 1) // 30)
    rows = one.rows(np.arange(one.size), np.zeros(one.size, int))
    assert (rows.ids.ravel() == one.store.tokens[: one.size * 30]).all() and one.counted(np.arange(3), np.zeros(3, int)).tolist() == [
        30
    ] * 3


@pytest.mark.parametrize("length", [300, 40])
def test_shares_are_those_of_the_rates_within_four_standard_deviations(length, tokenizers, tmp_path):
    """Of pieces of ASCII, which can all be rearranged, in windows of 256 tokens: documents longer and much shorter than a window."""
    own, rate, spm_rate = tokenizers["bytes"], 0.6, 0.3
    store = store_of(tmp_path, own, [("x" * length)[: length - i % 7] for i in range(60_000 // length)])
    one = examples_of(store, own, 256, rate=rate, spm_rate=spm_rate)
    rows = one.rows(np.arange(one.size), np.zeros(one.size, int))
    windows = [store.tokens[i * one.stride : (i + 1) * one.stride + 1] for i in range(one.size)]
    count = sum(len([piece for piece in pieces(window, own) if piece]) for window in windows)
    rearranged = int((rows.ids == one.sentinels.prefix).sum())
    spm = int(((rows.ids[:, :-1] == one.sentinels.prefix) & (rows.ids[:, 1:] == one.sentinels.suffix)).sum())
    empty_prefixes = rearranged * 2 / length  # of PSM, about: they look like SPM
    assert abs(rearranged - rate * count) < 4 * math.sqrt(count * rate * (1 - rate))
    assert abs(spm - spm_rate * rearranged) < 4 * math.sqrt(rearranged * spm_rate * (1 - spm_rate)) + 2 * empty_prefixes


def test_what_cannot_be_rearranged_stays_as_it_is(tokenizers, tmp_path):
    """Windows of bytes that begin inside of a character of three, and a document that holds the id of a special token."""
    own = tokenizers["bytes"]
    one = examples_of(store_of(tmp_path, own, ["猫" * 400]), own, 64)
    for number, ids in enumerate(one.rows(np.arange(one.size), np.zeros(one.size, int)).ids):
        start = number * one.stride
        is_whole = start % 3 == 0 and (start + one.stride + 1) % 3 == 0
        assert (ids[0] == one.sentinels.prefix) == is_whole
    ids = [*own.encode("some text"), one.sentinels.middle, *own.encode("more " * 60), own.end_of_text]
    write(tmp_path / "odd", [(np.array(ids), 1)], own.vocab_size, {})
    odd = examples_of(TokenStore(tmp_path / "odd"), own, 200)
    assert odd.rows(np.array([0]), np.array([0])).ids[0].tolist() == ids[:200]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 1.5}, "data.examples.rate = 1.5 does not work → use a finite number at least 0 and at most 1"),
        ({"spm_rate": -0.1}, "data.examples.spm_rate = -0.1 does not work → use a finite number at least 0 and at most 1"),
        ({"suffix": "<fim_middle>"}, "are not three tokens → give each its own"),
        ({"suffix": "<suf>"}, "has no token <suf> → name tokens that it has (suffix = '<suf>'), or use one that is made with them"),
        ({"prefix": "a"}, "reads the letters 'a' in a text as its token → use a tokenizer in which this token is special"),
    ],
)
def test_mistakes_of_settings(changes, message, tokenizers, tmp_path):
    store = store_of(tmp_path, tokenizers["bytes"], [TEXT])
    assert message in sentence(lambda: examples_of(store, tokenizers["bytes"], 64, **changes))


def test_mistakes_of_sizes_and_tokenizers(tokenizers, tmp_path):
    own = tokenizers["bytes"]
    store = store_of(tmp_path, own, [TEXT])
    assert "has no room for sentinels" in sentence(lambda: examples_of(store, own, 16))
    assert "is longer than the training corpus" in sentence(lambda: examples_of(store, own, 10_000))
    plain = tokenizer.fixed(tokenizer.BYTES)
    with pytest.raises(Mistake, match=r"has no token <fim_prefix>, <fim_suffix>, <fim_middle> .* such as builtin:bpe-8192\+fim"):
        sentinels_of(plain, *special_tokens.FIM)
