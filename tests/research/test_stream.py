"""Text comes as soon as it is certain, whole characters only, never past a stop string; together it is what the ids say."""

import random

import pytest

from research.data import tokenizer
from research.stream import Stream

STOPS = ["ab", "abc", "ba", "a\nb", "é", "€x", "  ", "cab"]


@pytest.fixture(scope="module")
def gpt2() -> tokenizer.Tokenizer:
    return tokenizer.gpt2()


class Bytes:
    """A tokenizer with an id for every byte."""

    def decode(self, ids) -> str:
        return bytes(ids).decode(errors="replace")


class Spaces:
    """A tokenizer that drops a space at the very beginning of a text, as SentencePiece's do."""

    WORDS = ("▁My", "▁fellow", "▁citizens", ",", "▁▁", "s")

    def decode(self, ids) -> str:
        return "".join(self.WORDS[i] for i in ids).replace("▁", " ").removeprefix(" ")


def streamed(stream: Stream, ids) -> list[str]:
    """What each id, and then the end, gives out; ids after a stop are not pushed."""
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


def test_a_character_in_two_tokens_comes_whole():
    """½ is C2 BD, € is E2 82 AC, 😀 is F0 9F 98 80."""
    pieces = streamed(Stream(Bytes(), []), "a½€😀b".encode())
    assert pieces == ["a", "", "½", "", "", "€", "", "", "", "😀", "b", ""]


def test_a_character_left_unfinished_is_left_out():
    assert streamed(Stream(Bytes(), []), b"ab\xe2\x82") == ["a", "b", "", "", ""]


def test_bytes_that_never_become_a_character_are_given_out_all_the_same():
    pieces = streamed(Stream(Bytes(), []), [0xFF] * 20 + list(b"ab"))
    assert "".join(pieces).endswith("ab") and "".join(pieces).count("\N{REPLACEMENT CHARACTER}") == 20
    assert any(pieces[:10])


def test_a_space_at_the_beginning_of_the_new_text_stays():
    assert streamed(Stream(Spaces(), [0]), [1, 2, 3, 4, 5]) == [" fellow", " citizens", ",", "  ", "s", ""]
    assert streamed(Stream(Spaces(), []), [0, 1]) == ["My", " fellow", ""]


def test_random_ids_of_a_real_tokenizer_add_up(gpt2):
    """Whatever the ids: what is given out is the text of all, but for a last unfinished character."""
    rng = random.Random(0)
    for _ in range(30):
        ids = gpt2.encode("".join(rng.choice("ab ½€😀\nü漢") for _ in range(40)))
        assert "".join(streamed(Stream(gpt2, gpt2.encode("My fellow")), ids)) == gpt2.decode(ids)


def test_a_stop_string_across_tokens_ends_the_text_before_it(gpt2):
    ids = gpt2.encode("one two\n\nThree four")
    assert "".join(streamed(Stream(gpt2, [], ["\nThr"]), ids)) == "one two\n"
    assert "".join(streamed(Stream(gpt2, [], ["never there"]), ids)) == "one two\n\nThree four"


def test_text_that_may_begin_a_stop_string_is_held_back():
    assert streamed(Stream(Bytes(), [], ["END"]), b"an EXTRA EN") == ["a", "n", " ", "", "EX", "T", "R", "A", " ", "", "", "EN"]
    stream = Stream(Bytes(), [], ["END"])
    assert streamed(stream, b"the END.") == ["t", "h", "e", " ", "", "", ""] and stream.stopped


def test_the_earliest_stop_string_counts():
    assert "".join(streamed(Stream(Bytes(), [], ["cd", "bcx", "c"]), b"abcd")) == "ab"


def test_any_text_and_any_stops_give_the_text_up_to_the_first():
    """Random texts cut into random tokens, against str.find on the whole."""
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choice("abcé€ \n") for _ in range(rng.randint(1, 30)))
        stops = rng.sample(STOPS, rng.randint(0, 3))
        found = [at for at in map(text.find, stops) if at >= 0]
        stream = Stream(Bytes(), [], stops)
        assert "".join(streamed(stream, text.encode())) == text[: min(found, default=None)], (text, stops)
        assert stream.stopped == bool(found)
