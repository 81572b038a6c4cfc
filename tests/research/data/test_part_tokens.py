"""Parts of a text whose tokens are known: the same tokens as if each part had been encoded as a whole."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data import part_tokens, tokenizer, tokenizer_file
from research.data.part_tokens import PartTokens

WORDS = [
    "def",
    "  ",
    " ",
    "\n",
    "\n\n",
    "\t",
    "it's",
    "über",
    "猫",
    "🎉x",
    "12",
    "return",
    "!?",
    "\u2028",
    "\u00a0",
    "a",
    "unbelievable",
    "\x1c",
]
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=30).map("".join)
MADE_FROM = "def unbelievable(it's):\n  return über 12 !? unbelievable\n\n" * 20


@pytest.fixture(scope="module")
def cutters(tmp_path_factory):
    place = tmp_path_factory.mktemp("cache")
    text = tokenizer.made_from("builtin:bpe-330+fim", [MADE_FROM])
    (place / "tokenizer.json").write_text(text)
    made = tokenizer.from_json("builtin:bpe-330+fim", text)
    found = [made, tokenizer_file.load("tokenizer.json", place), tokenizer.fixed("builtin:bytes"), tokenizer.gpt2()]
    return [PartTokens(own) for own in found]


@settings(max_examples=30, deadline=None)
@given(text=TEXTS, places=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_parts_have_the_tokens_of_their_text(text, places, cutters):
    begin, end = sorted(round(place * len(text)) for place in places)
    for cutter in cutters:
        own = cutter.tokenizer
        ids = np.array(own.encode(text), np.int64)
        assert cutter._bytes and cutter.text(ids) == text
        found = cutter.encoded(cutter.parts(ids, text, begin, end))
        assert [part.tolist() for part in found] == own.encode_batch([text[:begin], text[begin:end], text[end:]])


def test_parts_of_every_cut_of_runs_of_white_space(cutters):
    text = "a  b   it's\n\n  12 \n x é\t y"
    for cutter in cutters:
        ids = np.array(cutter.tokenizer.encode(text), np.int64)
        for begin, end in itertools.combinations_with_replacement(range(len(text) + 1), 2):
            found = cutter.encoded(cutter.parts(ids, text, begin, end))
            expected = cutter.tokenizer.encode_batch([text[:begin], text[begin:end], text[end:]])
            assert [part.tolist() for part in found] == expected, (cutter.tokenizer.name, begin, end)


def test_only_what_is_near_a_cut_is_encoded(cutters):
    text = "the cat sat on the mat\n" * 50
    for cutter in cutters:
        parts = cutter.parts(np.array(cutter.tokenizer.encode(text)), text, 401, 702)
        texts = [piece for part in parts for piece in part if isinstance(piece, str)]
        assert sum(map(len, texts)) < 20 and any(len(piece) for part in parts for piece in part if isinstance(piece, np.ndarray))


def test_tokens_that_encoding_does_not_give_are_encoded_again(cutters):
    """Tokens that go over a place where the pattern cuts: the part is encoded as a whole."""
    own = cutters[0].tokenizer
    bytes_of, number = part_tokens._bytes_of_tokens(own, set()), 100
    bytes_of[number] = b"a b"
    cutter = PartTokens(own)
    cutter._bytes, cutter._lengths = bytes_of, np.array([len(raw) for raw in bytes_of])
    ids = np.array([number] * 4)
    assert cutter.text(ids) == "a ba ba ba b"
    assert cutter.parts(ids, "a ba ba ba b", 0, 8) == [[""], ["a ba ba "], ["ba b"]]


def test_what_is_no_whole_text_has_none(cutters):
    cutter = cutters[2]
    own = cutter.tokenizer
    assert cutter.text(np.array([*"é".encode()][1:])) == "" and cutter.text(np.array([*"猫".encode()][:2])) == ""
    assert cutter.text(np.array([97, own.end_of_text])) == "" and cutter.text(np.array([*"\ufffd".encode()])) == "\ufffd"
    letters = tokenizer.from_json(tokenizer.CHARS, tokenizer.made_from(tokenizer.CHARS, ["abc \ufffd"]))
    other = PartTokens(letters)
    ids = np.array(letters.encode("ab c\ufffd"))
    assert not other._bytes and other.text(ids) == "ab c\ufffd" and other.text(np.append(ids, letters.end_of_text)) == ""
    assert [part.tolist() for part in other.encoded(other.parts(ids, "ab c\ufffd", 1, 3))] == letters.encode_batch(["a", "b ", "c\ufffd"])
