"""Standard input, output and error of a process, made safe at its entry points (research/launch.py, research/__main__.py).

A user chooses the streams: closed, in ASCII, on a full disk, in a pipe whose reader leaves. None of these may end in a traceback.
What is written may be a stranger's, by whatever code it comes there (a traceback, a warning of a library, a new verb's print): the streams
escape what steers a terminal. Text that this program shows is made `printable` where it is written.
"""

import codecs
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import IO, Any

from parallel.errors import Mistake
from parallel.text import printable

ESCAPING = "tessera.escaping"
"""The name of the error handler that `escape` is registered under."""
ASCII = {
    **{"→": "->", "←": "<-", "↓": "v", "▸": ">", "…": "...", "·": "-", "–": "-", "—": "-", "−": "-", "×": "x", "±": "+-"},
    **{"≤": "<=", "≥": ">=", "√": "sqrt", "∞": "inf", "°": "deg", "“": '"', "”": '"', "‘": "'", "’": "'", "\u00a0": " "},
}
"""What is written for our own signs, and the commonest of English text, where an encoding lacks them."""
STEERING_OF_LIBRARIES = re.compile(r"(\x1b\[[0-9;]{0,40}m|\r)")
"""A colour (SGR), and a carriage return, with which a progress bar begins."""


class OutputLost(OSError):
    """Standard output cannot be written: its disk is full, for example. (A reader that leaves is a BrokenPipeError.)"""


class _Output(io.FileIO):
    """Standard output as bytes. Its errors are told from those of other files by their class."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputLost(error.errno, error.strerror) from error


class _Error(io.FileIO):
    """Standard error as bytes. What cannot be written is dropped: there is no other place to report it."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_streams() -> None:
    """Opens closed standard streams on the null device, and replaces sys.stdout and sys.stderr by ones that escape what they cannot encode.

    Does nothing to a stream that a caller has already replaced, such as a test that captures output.
    """
    _occupy_descriptors()
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text_stream(_Output(1, "w", closefd=False), sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text_stream(_Error(2, "w", closefd=False), sys.stderr)


def _occupy_descriptors() -> None:
    """Opens descriptors 0, 1 and 2 if they are closed. Otherwise the next file to be opened would be taken for the terminal."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest closed one, which is this one
            os.set_inheritable(null, True)  # so that other ranks have it too


class EscapingStream(io.TextIOWrapper):
    """A text stream that writes `printable` text. Libraries' own colours and progress bars pass: SGR sequences and carriage returns."""

    def write(self, text: str) -> int:
        """Writes the text and returns its length, as if all of it had been written unchanged."""
        parts = STEERING_OF_LIBRARIES.split(text)  # every second part is one that passes
        super().write("".join(part if i % 2 else printable(part, most=None) for i, part in enumerate(parts)))
        return len(text)

    def write_exactly(self, text: str) -> int:
        """Writes the text as it is."""
        return super().write(text)


class _WithoutEscaping:
    """A EscapingStream whose `write` writes text as it is; everything else is the stream's own."""

    def __init__(self, stream: EscapingStream) -> None:
        self._stream, self.write = stream, stream.write_exactly

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def without_escaping(stream: Any) -> IO[str]:
    """The stream without the escaping of `prepare_streams`, for text that is safe already or asked for exactly."""
    return _WithoutEscaping(stream) if isinstance(stream, EscapingStream) else stream  # type: ignore[return-value]


def _text_stream(raw: io.FileIO, before: io.TextIOWrapper | Any) -> EscapingStream:
    """A text stream over `raw` with the encoding and the buffering of the stream `before`, which is None if it was closed."""
    unbuffered = getattr(before, "write_through", False)
    encoding = getattr(before, "encoding", "utf-8")
    lines = getattr(before, "line_buffering", False)
    return EscapingStream(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=encoding,
        errors=ESCAPING,
        line_buffering=lines,
        write_through=unbuffered,
    )


def escape(error: UnicodeError) -> tuple[str, int]:
    """Python's error handler for encoding: our own signs in ASCII, any other character as in JSON: \\u00e9."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(ASCII.get(letter) or json.dumps(letter)[1:-1] for letter in letters), error.end


codecs.register_error(ESCAPING, escape)


def escape_unencodable(stream: Any) -> None:
    """Makes a text stream escape what it cannot encode, instead of raising an error."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors != ESCAPING:
        stream.reconfigure(errors=ESCAPING)


def encodes_unicode(stream: Any) -> bool:
    """Whether the stream can write every character."""
    with contextlib.suppress(LookupError, TypeError):
        return codecs.lookup(getattr(stream, "encoding", "")).name.startswith("utf")
    return False


def discard_output() -> None:
    """Sends what standard output still holds to the null device: Python would raise an error about it when it exits."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


@contextlib.contextmanager
def flushed_output() -> Iterator[None]:
    """Flushes standard output after the body, also after an exit code or an error.

    A reader that leaves early (`| head`) ends the body and is no error. Raises a Mistake if the output cannot be written.
    """
    try:
        try:
            yield
        finally:
            try:
                sys.stdout.flush()
            except BrokenPipeError:  # here, so that the body's own error is not lost
                discard_output()
    except BrokenPipeError:
        discard_output()
    except OutputLost as error:
        discard_output()
        raise Mistake(f"standard output cannot be written ({error.strerror}) → make room on its disk, or send it elsewhere") from error
