"""Bytes, characters and tiktoken's ranks as tokens: closed forms, an independent tiktoken, and round trips of any text."""

import base64
import types

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import Mistake
from research import ROOT
from research.data import documents, prepare, tokenizer, tokenizer_file, tokenizer_ranks
from research.data.tokenizer import BYTES, CHARS, END_OF_TEXT

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
"""Whatever UTF-8 can hold."""


@given(TEXT)
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_from_bytes_and_from_its_own_characters(text):
    text += "<|endoftext|>"
    own = tokenizer.fixed(BYTES)
    assert own.encode(text) == list(text.encode()) and own.decode(own.encode(text)) == text
    letters = sorted(set(text))
    own = tokenizer.from_json(CHARS, tokenizer.made_from(CHARS, [text]))
    assert own.encode(text) == [letters.index(letter) for letter in text] and own.decode(own.encode(text)) == text
    assert own.vocab_size == len(letters) + 1 and own.end_of_text == len(letters)


@given(TEXT)
@settings(max_examples=50, deadline=None)
def test_any_text_comes_back_from_bpe_and_gpt2(gpt2_and_small, text):
    for own in gpt2_and_small:
        assert own.decode(own.encode(text)) == text


@pytest.fixture(scope="module")
def gpt2_and_small():
    return tokenizer.gpt2(), tokenizer.from_json("builtin:bpe-300", tokenizer.train_bpe(["the cat sat on the mat"] * 20, 300))


@given(TEXT)
@settings(max_examples=50, deadline=None)
def test_a_saved_tokenizer_gives_the_ids_of_the_table(tmp_path_factory, text):
    """The library's own model, from its file, as generate, serve and transformers load it, and our faster table."""
    folder = tmp_path_factory.mktemp("saved")
    for name, made in {BYTES: tokenizer.unit_tokenizer(), CHARS: tokenizer.made_from(CHARS, [text + "x"])}.items():
        (folder / "tokenizer.json").write_text(made, encoding="utf-8")
        theirs, ours = tokenizer_file.load(str(folder / "tokenizer.json"), ROOT), tokenizer.from_json(name, made)
        assert theirs.encode(text) == ours.encode(text) == ours.encode_arrays([text])[0].tolist()
        assert (theirs.vocab_size, theirs.end_of_text, theirs.begin) == (ours.vocab_size, ours.end_of_text, ())
        assert theirs.decode([*theirs.encode(text), ours.end_of_text]) == text + END_OF_TEXT


def test_a_character_that_is_not_there_is_named(tmp_path):
    """By the table and by the library's model alike; nothing is lost or replaced."""
    made = tokenizer.made_from(CHARS, ["abc"])
    (tmp_path / "tokenizer.json").write_text(made)
    for own in (tokenizer.from_json(CHARS, made), tokenizer_file.load("tokenizer.json", tmp_path)):
        for text in ("abcé!", "é", "a\x00é"[0:1] + "é"):
            with pytest.raises(Mistake, match=r"has no character 'é' \(U\+00E9\) → .*builtin:bytes"):
                own.encode(text)


def test_characters_of_a_corpus_of_ours_are_those_of_its_text():
    """A closed form, and nanoGPT's rule: ids are the places in the sorted set of characters."""
    texts = list(documents.documents("builtin:state_of_the_union/val", ROOT))
    own = tokenizer.from_json(CHARS, tokenizer.made_from(CHARS, texts))
    place = {letter: i for i, letter in enumerate(sorted(set("".join(texts))))}
    assert own.encode(texts[0]) == [place[letter] for letter in texts[0]] and own.vocab_size == len(place) + 1


@pytest.mark.parametrize("name", [BYTES, CHARS])
def test_they_are_made_for_an_experiment(tmp_path, lines, name):
    train, validation = lines("train.jsonl", ["abba", "cab"]), lines("val.jsonl", ["bac"])
    data = types.SimpleNamespace(train=train, validation=validation, tokenizer=name, cache="cache")
    size = 257 if name == BYTES else 4
    corpus = prepare.load(data, tmp_path, size)
    expected = [[*text.encode(), 256] if name == BYTES else [*("abc".index(letter) for letter in text), 3] for text in ("abba", "cab")]
    assert corpus.train.tokens.tolist() == sum(expected, []) and corpus.tokenizer.vocab_size == size
    assert corpus.validation.num_bytes == 3
    with pytest.raises(Mistake, match=f"vocab_size = {size - 1} has no room for the {size} tokens .* → set model.vocab_size = {size}"):
        prepare.load(data, tmp_path, size - 1)


def ranks_of(text: str, count: int) -> dict[bytes, int]:
    """Ranks as tiktoken's training makes them: the bytes, then `count` merges of the most frequent pair of neighbours."""
    ranks = {bytes([byte]): rank for rank, byte in enumerate(np.random.default_rng(0).permutation(256).tolist())}
    words = [[bytes([byte]) for byte in word.encode()] for word in regex.findall(tokenizer_ranks.CL100K, text)]
    for _ in range(count):
        pairs: dict[bytes, int] = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                pairs[b"".join(pair)] = pairs.get(b"".join(pair), 0) + 1
        best = max(sorted(pair for pair in pairs if pair not in ranks), key=pairs.__getitem__)
        ranks[best] = len(ranks)
        words = [merged(word, ranks) for word in words]
    return ranks


def merged(word: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """tiktoken's rule: as long as two neighbours together are a token, those of the lowest rank, from the left, become one."""
    while True:
        known = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(word, word[1:], strict=False)) if a + b in ranks]
        if not known:
            return word
        i = min(known)[1]
        word = [*word[:i], word[i] + word[i + 1], *word[i + 2 :]]


SAMPLE = "The state of the union is strong; 12,345 reasons.\n\n  Don't stop: naïve café — 猫\r\n\tdef f(x):\n        return x  "


@pytest.fixture(scope="module")
def ranks():
    return ranks_of(SAMPLE * 3 + "the then they there", 60)


def load(folder, ranks):
    (folder / "tokenizer.json").write_text(tokenizer_ranks.tokenizer_json(ranks), encoding="utf-8")
    return tokenizer_file.load("tokenizer.json", folder)


def test_ranks_give_tiktokens_ids(tmp_path, ranks):
    """The rule written out, on the words of the pattern as the `regex` library finds them."""
    own = load(tmp_path, ranks)
    for text in (SAMPLE, SAMPLE.upper(), "theythere 猫猫 1234567 \n \n x'LL", ""):
        words = regex.findall(tokenizer_ranks.CL100K, text)
        expected = [ranks[part] for word in words for part in merged([bytes([byte]) for byte in word.encode()], ranks)]
        assert own.encode(text) == expected and own.decode(expected) == text
    assert own.end_of_text == len(ranks) and own.vocab_size == len(ranks) + 1


def test_a_token_may_be_made_of_any_two_tokens(tmp_path):
    """'abcd' of 'abc' and 'd' or of 'ab' and 'cd', whichever neighbours there are, as tiktoken merges by the rank of the whole."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {
        token: 256 + i for i, token in enumerate([b"ab", b"abc", b"cd", b"abcd", b"yz"])
    }
    own = load(tmp_path, ranks)
    for text in ("abcd", "xabcd", "xabcdyz", "abcabcd", "cdab cdabcd", "xyzabccd"):
        words = regex.findall(tokenizer_ranks.CL100K, text)
        assert own.encode(text) == [ranks[part] for word in words for part in merged([bytes([byte]) for byte in word.encode()], ranks)], (
            text
        )


@given(TEXT)
@settings(max_examples=50, deadline=None)
def test_any_text_comes_back_from_ranks(tmp_path_factory, ranks, text):
    own = load(tmp_path_factory.mktemp("ranks"), ranks)
    assert own.decode(own.encode(text)) == text


def test_a_file_of_ranks(tmp_path, ranks):
    path = tmp_path / "my.tiktoken"
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert tokenizer_ranks.read(path) == ranks
    for raw, words in {
        b"\n".join([*lines, b"%%% 5"]): f"line {len(ranks) + 1} is no token in base64",
        b"\n".join(lines[5:]): f"has {len(ranks) - 5} tokens, and none for the byte",
        b"\n".join([*lines[:-1], lines[-1] + b"9"]): "ranks are not 0 to",
        b"PK\3\4": "line 1 is no token",
    }.items():
        path.write_bytes(raw)
        with pytest.raises(Mistake, match=words):
            tokenizer_ranks.read(path)


def test_the_letters_of_bytes_are_gpt2s():
    own = tokenizer.gpt2()
    vocabulary = own.backend.get_vocab()
    assert all(letter in vocabulary for letter in tokenizer.BYTE_LETTERS) and len(set(tokenizer.BYTE_LETTERS)) == 256
    assert [own.decode([vocabulary[tokenizer.BYTE_LETTERS[byte]]]) for byte in range(128)] == [chr(b) for b in range(128)]
