"""Standard streams that are closed, full, in ASCII, or whose reader leaves: in real processes, none of which ends in a traceback."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from research import ROOT
from research.tracking.streams import ASCII, ESCAPING, encodes_unicode, escape_unencodable

TEXT = "é → 😀"
PROGRAM = f"""
import sys
from parallel.errors import Mistake
from research.tracking.streams import flushed_output, prepare_streams
prepare_streams()
try:
    with flushed_output():
        print({TEXT!r} * int(sys.argv[1]))
        sys.stderr.write({TEXT!r})
        if sys.argv[2:]:
            raise SystemExit(5)
except Mistake as mistake:
    sys.stderr.write(str(mistake))
    sys.exit(2)
"""
Done = subprocess.CompletedProcess[str]


def shell(redirected: str, *arguments: str, flags: tuple[str, ...] = (), **environ: str) -> Done:
    command = ["bash", "-c", f'set -o pipefail; "$@" {redirected}', "bash", sys.executable, *flags, "-c", PROGRAM, *arguments]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LC_"))}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=inherited | environ, timeout=60)


@pytest.mark.parametrize("flags", [(), pytest.param(("-u",), marks=pytest.mark.slow)], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    ("redirected", "code", "out", "err"),
    [
        (">&- 2>&- <&-", 0, "", ""),
        pytest.param(">&-", 0, "", TEXT, marks=pytest.mark.slow),
        pytest.param("2>&-", 0, f"{TEXT}\n", "", marks=pytest.mark.slow),
        pytest.param("2>/dev/full", 0, f"{TEXT}\n", "", marks=pytest.mark.slow),
        (">/dev/full 2>/dev/full", 2, "", ""),
    ],
)
def test_a_stream_that_takes_nothing(redirected: str, code: int, out: str, err: str, flags: tuple[str, ...]) -> None:
    done = shell(redirected, "1", flags=flags, PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


@pytest.mark.parametrize("flags", [(), pytest.param(("-u",), marks=pytest.mark.slow)], ids=["buffered", "unbuffered"])
def test_a_full_disk_is_told_in_a_sentence(flags: tuple[str, ...]) -> None:
    done = shell(">/dev/full", "1", flags=flags, PYTHONIOENCODING="utf-8")
    assert done.returncode == 2
    said = "standard output cannot be written (No space left on device) → make room on its disk, or send it elsewhere"
    assert done.stderr in (said, TEXT + said)  # unbuffered, the first write fails


@pytest.mark.slow
@pytest.mark.parametrize("repeated", ["1", "100000"])
def test_a_reader_that_leaves_is_no_error_and_keeps_the_exit_code(repeated: str) -> None:
    done = shell("| true", repeated, PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stdout, done.stderr.replace(TEXT, "")) == (0, "", "")
    assert shell("| cat >/dev/null", "1", "leave").returncode == 5


def test_ascii_is_enough() -> None:
    done = shell("", "1", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u00e9 -> \\ud83d\\ude00\n", "\\u00e9 -> \\ud83d\\ude00")


def test_what_is_escaped_is_json() -> None:
    letters = "".join(chr(i) for i in (0xE9, 0x3B1, 0x4E2D, 0x1F600, 0xD800)) + "".join(ASCII)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=ESCAPING)
    stream.write(letters)
    stream.flush()
    written = stream.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert json.loads(f'"{written.partition("->")[0]}"') == letters[:5]
    assert all(shown.isascii() and shown for shown in ASCII.values())


def test_a_lone_surrogate_ends_no_utf8_stream() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    escape_unencodable(stream)
    stream.write("a\udcffé")
    stream.flush()
    assert stream.buffer.getvalue() == "a\\udcffé".encode()  # type: ignore[attr-defined]
    assert encodes_unicode(stream) and not encodes_unicode(io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))


@pytest.mark.slow
@pytest.mark.parametrize("environ", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
@pytest.mark.parametrize(
    "command", ["-m research --help", "-m research runs", "{} --help", "{} --dry-run", "{} --help data", "{} --data.train ½"]
)
def test_the_entry_points_in_ascii(command: str, environ: dict[str, str], tmp_path: Path) -> None:
    words = command.format("experiments/gpt_sotu/launch.py").split()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=os.environ | environ, timeout=60)
    assert done.returncode == (2 if "½" in command else 0)
    assert (done.stdout + done.stderr).isascii() and "Traceback" not in done.stderr and "\\ufffd" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("redirected", [">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full", "2>/dev/full", "| true"])
@pytest.mark.parametrize(
    "command", ["-m research --help", "-m research runs --json", "-m research nonsense", "{} --dry-run", "{} --model.x 3"]
)
def test_the_entry_points_with_streams_that_take_nothing(command: str, redirected: str) -> None:
    words = command.format("experiments/gpt_sotu/launch.py")
    line = f"set -o pipefail; {sys.executable} {words} {redirected}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, timeout=60)
    refused = "nonsense" in command or "model.x" in command
    full = redirected == ">/dev/full" and not refused
    assert done.returncode == (2 if refused or full else 0)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


NET = """
import sys
from rich.text import Text
from research.tracking.console import Console
from research.tracking.streams import prepare_streams, without_escaping
prepare_streams()
text = "a\\x1b]0;owned\\x07\\x1b[2J\\x9b\\u202e\\u2028b"
print(text, "\\x1b[1mbold\\x1b[0m", "\\rbar", flush=True)
Console(terminal=True).header([(text, text)])
without_escaping(sys.stdout).write(text)
raise ValueError(text)
"""


def test_the_streams_escape_what_steers_a_terminal():
    """A print, our console, and a traceback. Colours and carriage returns of libraries pass, as does what is asked for exactly."""
    done = subprocess.run([sys.executable, "-c", NET], capture_output=True, cwd=ROOT, timeout=120)
    escaped = r"a\x1b]0;owned\x07\x1b[2J\x9b\u202e\u2028b"
    printed, *header, exactly = done.stdout.decode().split("\n")
    assert printed == f"{escaped} \x1b[1mbold\x1b[0m \rbar"
    assert len(header) == 1 and header[0].startswith("\x1b[") and header[0].count(escaped) == 2 and "]0;" in header[0]
    assert header[0].count("\x1b") == 2 and exactly == "a\x1b]0;owned\x07\x1b[2J\x9b\u202e\u2028b"
    assert f"ValueError: {escaped}" in done.stderr.decode()
