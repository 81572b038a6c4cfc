"""Documents of a corpus: a built-in text, or the user's own files and folders of text (research/data/text_files.py)."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from parallel.errors import Mistake, listed, nearest
from parallel.files import user_path
from research.data import pair_text, python_stdlib, text_files
from research.data.pair_text import Pair
from research.data.text_files import KINDS, LINES, LeftOut, Reading, TextFile

BUILTIN = "builtin:"
STDLIB = f"{BUILTIN}{python_stdlib.NAME}/"
FOLDER = Path(__file__).parent / "builtin"
Spec = str | tuple[str, ...]
"""The name of a text: of one, or of several whose documents follow one another."""
SHOWN = 2
"""Of several texts, how many a sentence names."""
CONTENT = f"some text (of a .txt), or one object such as {text_files.EXAMPLE} a line (of a .jsonl)"


def each(spec: Spec) -> tuple[str, ...]:
    """The texts that are read as one."""
    return (spec,) if isinstance(spec, str) else spec


def label(spec: Spec) -> str:
    """'a.txt', or 'a.txt, b.txt and 7 more'."""
    names = each(spec)
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return names[0] if len(names) == 1 else listed([*names[:SHOWN], *more], "and")


def documents(spec: Spec, root: Path) -> Iterator[str]:
    """The texts of `documents_and_pairs`, in order. That of a pair has both sides, in lines of their own."""
    return (one.text if isinstance(one, Pair) else one for one in documents_and_pairs(spec, root))


def documents_and_pairs(spec: Spec, root: Path) -> Iterator[str | Pair]:
    """The documents of `builtin:NAME/SPLIT`, of a file or of a folder's files, in order; of several, one after the other.

    A relative path starts at `root`.

    A file of plain text is one document; the other kinds hold one per line (blank lines are skipped) or row, under "text". A line with
    "source" and "target" is a pair. Whatever cannot be read, a corpus without a single character included, is a Mistake that names file
    and line.
    """
    is_empty = True
    for file in _files(spec, root):
        for one in _lines(file) if file.kind == LINES else _texts(file):
            is_empty = is_empty and not one
            yield one
    if is_empty:
        names = label(tuple(str(check_exists(name, root)) for name in each(spec)))
        raise Mistake(f"{names} holds no text → give it {CONTENT}, or use {listed(builtin_names())}")


def _lines(file: TextFile) -> Iterator[str | Pair]:
    reading, left = Reading(), LeftOut()
    for place, line in file.lines(reading, left):
        value = text_files.line_value(line, place, reading)
        yield (pair_text.pair_of if pair_text.is_pair(value) else text_files.text_of)(value, place, reading, left)


def _texts(file: TextFile) -> Iterator[str]:
    parts: list[str] = []
    for text, is_last in file.fragments(Reading(), LeftOut()):
        parts.append(text)
        if is_last:
            yield "".join(parts)
            parts.clear()


def check_exists(spec: str, root: Path, setting: str = "the corpus") -> Path:
    """The file or folder that `spec` names; a Mistake beginning with `setting` if there is none. Reads beginnings, imports no torch."""
    names = builtin_names()
    if spec.startswith(STDLIB) and spec in names:
        return python_stdlib.root()
    if spec in names:
        return FOLDER / f"{spec.removeprefix(BUILTIN)}.jsonl.xz"
    if spec.startswith(BUILTIN):
        near = nearest(spec, names)
        guess = f"{near} is meant? " if near else ""
        raise Mistake(f"{setting} = {spec!r} is not a built-in corpus → {guess}use {listed(names)}")
    left = LeftOut()
    try:
        path = user_path(root, spec)
        files = text_files.find(path, path.name, left)
    except Mistake as mistake:
        raise Mistake(f"{setting} = {spec!r}: {mistake}, or use {listed(names)}") from None
    if not files:
        why = left.sentence() or "it is empty"
        raise Mistake(f"{setting} = {spec!r}: {path} holds no file of text: {why} → name a {listed(KINDS)} file, or use {listed(names)}")
    return path


def digest(spec: Spec, root: Path) -> str:
    """SHA-256 (hex) of the stored corpus and of the way it is read: equal digests mean equal documents.

    Of a folder, that of its files and of their names in it, in order. Of several texts, that of their digests.
    """
    if not isinstance(spec, str):
        return hashlib.sha256("\0".join(digest(name, root) for name in spec).encode()).hexdigest()
    files = _files(spec, root)
    if not check_exists(spec, root).is_dir():
        return _digest(files[0]).hexdigest()
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.name}\0{_digest(file).hexdigest()}\0".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def paths(spec: Spec, root: Path) -> list[Path]:
    """The files that are read, in order."""
    return [file.path for file in _files(spec, root)]


def _digest(file: TextFile) -> "hashlib._Hash":
    sha256 = hashlib.sha256(f"{file.kind}{file.compression}\0".encode())
    with file.readable(), open(file.path, "rb") as opened:
        while block := opened.read(1 << 20):
            sha256.update(block)
    return sha256


def _files(spec: Spec, root: Path) -> list[TextFile]:
    found = []
    for name in each(spec):
        path = check_exists(name, root)
        if name.startswith(STDLIB):
            found += [TextFile(file, str(file.relative_to(path))) for file in python_stdlib.files(name.removeprefix(STDLIB))]
            continue
        found += text_files.find(path, "", LeftOut()) if path.is_dir() else [TextFile(path, path.name)]
    return found


def builtin_names() -> list[str]:
    """Every `builtin:NAME/SPLIT` that comes with Tessera, or with Python."""
    files = FOLDER.glob("*/*.jsonl.xz")
    shipped = [f"{BUILTIN}{file.parent.name}/{file.name.removesuffix('.jsonl.xz')}" for file in files]
    return sorted([*shipped, *(f"{STDLIB}{split}" for split in python_stdlib.SPLITS)])
