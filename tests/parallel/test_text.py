"""Text of users: written by Python's own codecs, read back; an error names file and line."""

import io

import pytest

from parallel import text
from parallel.errors import Mistake
from parallel.text import printable

TEXTS = ["", "one", "One\n\n  two ½\r\n猫 🙂\n", "\n\nx", "a\u2028b\x0cc\rd", "\ufeff twice"]


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("content", TEXTS[:-1])
def test_a_text_is_read_without_its_mark_and_its_line_ends_stay(tmp_path, codec, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode(codec))
    assert text.read_text(path) == content
    expected = [line.removesuffix("\r") for line in content.split("\n")]
    assert [line for _, line in text.read_lines(path)] == expected
    with path.open("rb") as file:
        found = [line for _, line in text.lines(file, "a")]
    assert found == expected or [*found, ""] == expected  # line by line, there is no empty line behind the last line end


def test_only_the_first_mark_is_taken_away():
    assert text.decoded(TEXTS[-1].encode("utf-8-sig"), "a") == TEXTS[-1]
    assert [line for _, line in text.lines(io.BytesIO("a\n\ufeffb".encode("utf-8-sig")), "a")] == ["a", "\ufeffb"]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"ab\xffcd", "a.txt, line 1 is not UTF-8 (byte 2: invalid start byte) → save it as UTF-8"),
        (b"\xef\xbb\xbfone\r\n\ntwo \xe9t\xe9\n", "a.txt, line 3 is not UTF-8 (byte 4: invalid continuation byte) → save it as UTF-8"),
        (b"one\nhalf \xe2\x82", "a.txt, line 2 is not UTF-8 (byte 5: unexpected end of data) → save it as UTF-8"),
        ("one\ntwo".encode("utf-16"), "a.txt is UTF-16 → save it as UTF-8"),
        ("one\ntwo".encode("utf-16-be").join([b"\xfe\xff", b""]), "a.txt is UTF-16 → save it as UTF-8"),
    ],
)
def test_the_line_that_is_not_utf8_is_named(tmp_path, raw, said):
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    for read in (text.read_text, lambda path, name: list(text.read_lines(path, name))):
        with pytest.raises(Mistake) as caught:
            read(path, "a.txt")
        assert str(caught.value) == said


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(Mistake, match="^--file .*none.txt cannot be read .No such file or directory. → name another$"):
        text.read_text(tmp_path / "none.txt", f"--file {tmp_path / 'none.txt'}", "name another")
    with pytest.raises(Mistake, match="cannot be read .Is a directory. → check the file and its permissions"):
        text.read_lines(tmp_path)


@pytest.mark.parametrize("line", ["{", "[" * 100_000, "1" * 5000, '{"a": ' + "9" * 5000 + "}", ""])
def test_what_is_not_json_is_named(line):
    with pytest.raises(Mistake, match="^a, line 3 is not JSON .* → write {}$"):
        text.json_value(line, "a, line 3", "{}")


STEERING = ("\x1b[31m", "\x9b2J", "\r", "\b", "\a", "\0", "\x7f", "\u202e", "\u2066", "\u200f", "\u200b", "\ufeff", "\u2028", "\U000e0041")
"""Escape sequences (7 and 8 bit), carriage return, backspace, bell, NUL, DEL; marks of direction and zero width; other line ends; tags."""


@pytest.mark.parametrize("mark", STEERING)
def test_what_could_steer_a_terminal_is_an_escape(mark: str) -> None:
    """Python's own escapes, which `unicode_escape` reads back; everything else stays as it is."""
    shown = printable(f"a{mark}\n\té漢")
    assert shown.endswith("\n\té漢") and all(letter.isprintable() or letter in "\n\t" for letter in shown)
    assert shown.removesuffix("\n\té漢").encode("ascii").decode("unicode_escape") == f"a{mark}"


def test_a_long_text_says_how_much_of_it_is_left_out() -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(100_000))
    assert printable(text, 50) == f"{text[:50]}… (99,950 characters left out)"
    assert printable(text, 50, tail=20) == f"{text[:30]}… (99,950 characters left out) …{text[-20:]}"
    assert printable(text, None) == text and printable(text[:50], 50) == text[:50]
    assert len(printable("\x1b" * 100_000, 50)) < 300  # escapes are longer than what they stand for
