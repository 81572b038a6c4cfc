"""Text in, documents out: a built-in corpus or the user's own .txt, .jsonl, .jsonl.xz or .jsonl.gz file."""

import contextlib
import difflib
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from parallel.errors import Mistake

BUILTIN = "builtin:"
FOLDER = Path(__file__).parent / "builtin"
OPENERS: dict[str, Callable] = {".jsonl": open, ".jsonl.xz": lzma.open, ".jsonl.gz": gzip.open, ".txt": open}
EXAMPLE = '{"text": "one document"}'
BOM = b"\xef\xbb\xbf"


def documents(spec: str, root: Path) -> Iterator[str]:
    """The documents of `builtin:NAME/SPLIT` or of a file, in file order. A relative path starts at `root`.

    A .txt file is one document; the others hold one object with a "text" a line (blank lines are skipped).
    Whatever cannot be read, a corpus without a single character included, is a Mistake naming file and line.
    """
    path = check_exists(spec, root)
    characters = 0
    for text in _read(path):
        characters += len(text)
        yield text
    if not characters:
        raise Mistake(f"{path} holds no text → give it {_shape(path)}, or use {_builtin_sentence()}")


def check_exists(spec: str, root: Path, setting: str = "the corpus") -> Path:
    """The file `spec` stands for; a Mistake beginning with `setting` if there is none. Reads nothing, imports no torch."""
    if spec.startswith(BUILTIN):
        return _builtin_path(spec, setting)
    path = Path(root) / Path(spec).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise Mistake(f"{setting} = {spec!r}: {path} {what} → name a {_kinds()} file, or use {_builtin_sentence()}")
    if not _kind(path):
        raise Mistake(f"{setting} = {spec!r} is not a kind of file that is known → use {_kinds()}")
    if path.stat().st_size == 0:
        raise Mistake(f"{setting} = {spec!r}: {path} is empty → give it {_shape(path)}, or use {_builtin_sentence()}")
    return path


def digest(spec: str, root: Path) -> str:
    """SHA-256 (hex) of the corpus as stored, and of the way it is read: equal digests hold equal documents."""
    path = check_exists(spec, root)
    found = hashlib.sha256(f"{_kind(path)}\0".encode())
    with _readable(path), open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def builtin_names() -> list[str]:
    """Every `builtin:NAME/SPLIT` that ships with Tessera."""
    files = FOLDER.glob("*/*.jsonl.xz")
    return sorted(f"{BUILTIN}{file.parent.name}/{file.name.removesuffix('.jsonl.xz')}" for file in files)


def _builtin_path(spec: str, setting: str) -> Path:
    names = builtin_names()
    if spec in names:
        return FOLDER / f"{spec.removeprefix(BUILTIN)}.jsonl.xz"
    near = difflib.get_close_matches(spec, names, n=1)
    guess = f"{near[0]} is meant? " if near else ""
    raise Mistake(f"{setting} = {spec!r} is not a built-in corpus → {guess}use {_builtin_sentence()}")


def _builtin_sentence() -> str:
    names = builtin_names()
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _kind(path: Path) -> str:
    """The key of OPENERS that ends the file's name; empty if none does."""
    return next((kind for kind in OPENERS if path.name.endswith(kind)), "")


def _kinds() -> str:
    return ", ".join(list(OPENERS)[:-1]) + f" or {list(OPENERS)[-1]}"


def _shape(path: Path) -> str:
    return "some text" if _kind(path) == ".txt" else f"one object such as {EXAMPLE} a line"


def _read(path: Path) -> Iterator[str]:
    kind = _kind(path)
    with _readable(path), OPENERS[kind](path, "rb") as file:
        yield from [_whole(file, path)] if kind == ".txt" else _lines(file, path)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever the file system or the decompressor has to say about `path`, as a Mistake."""
    try:
        yield
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise Mistake(f"{path} is not a whole {_kind(path)} file ({error}) → compress it again") from error
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror or error}) → check the file and its permissions") from error


def _whole(file: BinaryIO, path: Path) -> str:
    return _decode(file.read().removeprefix(BOM), str(path))


def _lines(file: BinaryIO, path: Path) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(BOM)
        if line.strip():
            yield _text(line, f"{path}, line {number}")


def _text(line: bytes, where: str) -> str:
    """The "text" of one JSON line."""
    try:
        value = json.loads(_decode(line, where))
    except (json.JSONDecodeError, RecursionError) as error:
        raise Mistake(f"{where} is not JSON ({error}) → write one object such as {EXAMPLE} a line") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise Mistake(f'{where} has no "text" → write one object such as {EXAMPLE} a line')
    return _encodable(value["text"], where)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Mistake(f"{where} is not UTF-8 (byte {error.start}: {error.reason}) → save it as UTF-8") from error


def _encodable(text: str, where: str) -> str:
    """JSON can spell half a surrogate pair, which no UTF-8 text holds and no byte-level tokenizer can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Mistake(f"{where} has half a surrogate pair at character {error.start} → write the whole character") from error
    return text
