"""Text of users: written by Python's own codecs, read back; an error names file and line."""

import io

import pytest

from parallel import text
from parallel.errors import Mistake

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
