"""Documents of a corpus: a built-in text, or the user's own .txt, .jsonl, .jsonl.xz or .jsonl.gz file."""

import contextlib
import gzip
import hashlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from parallel.errors import Mistake, listed, nearest
from parallel.text import decoded, json_value, lines, refuse_half_characters

BUILTIN = "builtin:"
FOLDER = Path(__file__).parent / "builtin"
OPENERS: dict[str, Callable] = {".jsonl": open, ".jsonl.xz": lzma.open, ".jsonl.gz": gzip.open, ".txt": open}
EXAMPLE = '{"text": "one document"}'
CONTENT = {suffix: "some text" if suffix == ".txt" else f"one object such as {EXAMPLE} a line" for suffix in OPENERS}


def documents(spec: str, root: Path) -> Iterator[str]:
    """The documents of `builtin:NAME/SPLIT` or of a file, in file order. A relative path starts at `root`.

    A .txt file is one document; the other kinds hold one JSON object with a "text" per line (blank lines are skipped).
    Whatever cannot be read, a corpus without a single character included, is a Mistake that names file and line.
    """
    path = check_exists(spec, root)
    suffix, characters = _suffix(path), 0
    with _readable(path), OPENERS[suffix](path, "rb") as file:
        if suffix == ".txt":
            texts = iter([decoded(file.read(), str(path))])
        else:
            texts = (_text(line, place) for place, line in lines(file, str(path)) if line.strip())
        for text in texts:
            characters += len(text)
            yield text
    if not characters:
        raise Mistake(f"{path} holds no text → give it {CONTENT[suffix]}, or use {listed(builtin_names())}")


def check_exists(spec: str, root: Path, setting: str = "the corpus") -> Path:
    """The file that `spec` names; a Mistake beginning with `setting` if there is none. Reads nothing, imports no torch."""
    names = builtin_names()
    if spec in names:
        return FOLDER / f"{spec.removeprefix(BUILTIN)}.jsonl.xz"
    if spec.startswith(BUILTIN):
        near = nearest(spec, names)
        guess = f"{near} is meant? " if near else ""
        raise Mistake(f"{setting} = {spec!r} is not a built-in corpus → {guess}use {listed(names)}")
    path = Path(root) / Path(spec).expanduser()
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise Mistake(f"{setting} = {spec!r}: {path} {problem} → name a {listed(OPENERS)} file, or use {listed(names)}")
    if not _suffix(path):
        raise Mistake(f"{setting} = {spec!r} is not a kind of file that is known → use {listed(OPENERS)}")
    if path.stat().st_size == 0:
        raise Mistake(f"{setting} = {spec!r}: {path} is empty → give it {CONTENT[_suffix(path)]}, or use {listed(names)}")
    return path


def digest(spec: str, root: Path) -> str:
    """SHA-256 (hex) of the stored corpus and of the way it is read: equal digests mean equal documents."""
    path = check_exists(spec, root)
    sha256 = hashlib.sha256(f"{_suffix(path)}\0".encode())
    with _readable(path), open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def builtin_names() -> list[str]:
    """Every `builtin:NAME/SPLIT` that comes with Tessera."""
    files = FOLDER.glob("*/*.jsonl.xz")
    return sorted(f"{BUILTIN}{file.parent.name}/{file.name.removesuffix('.jsonl.xz')}" for file in files)


def _suffix(path: Path) -> str:
    """The key of OPENERS with which the file's name ends; empty if there is none."""
    return next((suffix for suffix in OPENERS if path.name.endswith(suffix)), "")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns the errors of the file system and of the decompressor into a Mistake that names `path`."""
    try:
        yield
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise Mistake(f"{path} is not a whole {_suffix(path)} file ({error}) → compress it again") from error
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror or error}) → check the file and its permissions") from error


def _text(line: str, place: str) -> str:
    """The "text" of one JSON line."""
    value = json_value(line, place, f"one object such as {EXAMPLE} a line")
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise Mistake(f'{place} has no "text" → write one object such as {EXAMPLE} a line')
    refuse_half_characters(value["text"], place)
    return value["text"]
