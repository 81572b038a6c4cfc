"""The texts that a corpus is prepared from: which files they are, a first reading that counts and checks them, and their pieces."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parallel.errors import Mistake, listed
from parallel.files import published, sha256_of, user_path
from research.data import text_files
from research.data.random_split import Split
from research.data.text_files import Advance, Fragment, Item, LeftOut, Reading, TextFile
from research.data.tokenizer import PIECE, Tokenizer, UnitTokenizer, pieces

UNCUT = 1 << 20
"""Characters of a text up to which it is tokenized as a whole by a tokenizer whose ids may depend on where a text is cut."""
LONGEST_WORD = 1 << 18
"""Characters without a place to cut from which on a text is cut anywhere, for any tokenizer."""
GROUP = 1 << 19
"""Characters that are tokenized at a time."""
AT_ONCE = 1 << 12
"""Documents that are assigned to parts at a time."""
MOST_TRAINED = 1 << 27
"""Characters that a byte-level BPE is trained on at most, spread evenly over the texts."""


@dataclass
class Inventory:
    """What the first reading has found. Each document of it that has a character is in the corpus."""

    files: int = 0
    file_bytes: int = 0
    documents: int = 0
    characters: int = 0
    text_bytes: int = 0
    """Of the documents, as UTF-8."""
    empty: int = 0
    """Documents without a character, which are left out."""
    replaced: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    sha256: str = ""
    """Of all files' contents and of the way they are read."""


class Piece(NamedTuple):
    """A part of a document, whether it is the last part, and whether the cut behind it may change the ids."""

    text: str
    is_last: bool
    may_differ: bool


class Group(NamedTuple):
    """Texts that are tokenized together, one after the other. A document ends after each text for which `ends` is true."""

    texts: list[str]
    ends: list[bool]
    cuts: int
    """Places where a text is cut and the ids may be others than those of the whole."""


class Inputs:
    """The files, and the way they are read."""

    def __init__(self, names: Sequence[str], root: Path, reading: Reading) -> None:
        """The files and folders named, as they are now. A relative path starts at `root`. A Mistake if one cannot be used."""
        self.reading, self.left = reading, LeftOut()
        self.files: list[TextFile] = []
        for name in names:
            left = LeftOut()
            found = text_files.find(user_path(root, name), name, left)
            if not found:
                raise Mistake(f"{name} has no file of text: {left.sentence() or 'it is empty'} → leave it out, or name another folder")
            self.files += found
            for reason, number in left.files.items():
                self.left.leave_out(reason, number)
        seen: dict[Path, str] = {}
        self.states: list[tuple[str, int, int]] = []
        for file in self.files:
            place = file.path.resolve()
            if place in seen:
                raise Mistake(f"{file.name} is {seen[place]} once more → name each text once, so that none is both trained on and held out")
            status, seen[place] = file.path.stat(), file.name
            self.states.append((file.name, status.st_size, status.st_mtime_ns))
        self.file_bytes = sum(size for _, size, _ in self.states)

    def identity(self) -> str:
        """A hash of the files' names, sizes and times of change, and of the way they are read: equal if nothing has changed."""
        return hashlib.sha256(json.dumps([self.states, asdict(self.reading)]).encode()).hexdigest()

    def read_all(self, sources: Path, advance: Advance) -> Inventory:
        """Reads everything once, and writes a line of JSON for each file to `sources`. Whatever cannot be read is a Mistake."""
        found, whole = Inventory(files=len(self.files), file_bytes=self.file_bytes), hashlib.sha256()
        whole.update(json.dumps(asdict(self.reading)).encode())
        with published(sources) as temporary, open(temporary, "w", encoding="utf-8") as record:
            for number, (file, (_, size, _)) in enumerate(zip(self.files, self.states, strict=True)):
                with file.readable():
                    digest = sha256_of(file.path)
                before, length = found.documents, 0
                for text, is_last in self._fragments(number, advance):
                    length += len(text)
                    found.text_bytes += len(text.encode("utf-8"))
                    if is_last:
                        found.documents += length > 0
                        found.empty += not length
                        found.characters, length = found.characters + length, 0
                entry = {"path": file.name, "bytes": size, "sha256": digest, "documents": found.documents - before}
                record.write(json.dumps(entry) + "\n")
                whole.update(f"{file.kind}{file.compression}\0{digest}\0".encode())
        if not found.characters:
            raise Mistake(
                f"{listed([file.name for file in self.files[:4]], 'and')} holds no text, only empty documents → name another text"
            )
        found.replaced, found.left_out, found.sha256 = self.left.replaced, self.left.files, whole.hexdigest()
        return found

    def _fragments(self, number: int, advance: Advance) -> Iterator[Fragment]:
        """The documents of a file in parts. A Mistake if it is not what it was when it was found."""
        return self._unchanged(number, self.files[number].fragments(self.reading, self.left, advance))

    def _unchanged(self, number: int, found: Iterable[Item]) -> Iterator[Item]:
        """What is read of a file. A Mistake if it is not what it was when it was found."""
        file, (_, size, changed) = self.files[number], self.states[number]
        for reading in (found, ()):  # looked at before and afterwards
            with file.readable():
                status = file.path.stat()
            if (status.st_size, status.st_mtime_ns) != (size, changed):
                raise Mistake(f"{file.path} has changed while it was read → run the command again when nothing writes to it")
            yield from reading

    def texts(self, advance: Advance) -> Iterator[str]:
        """All texts, in pieces."""
        return (piece.text for piece in self._pieces(PIECE, False, advance))

    def training_texts(self, split: Split, characters: int, advance: Advance) -> Iterator[str]:
        """Pieces of the part `train` of a split, in characters if it is by position: MOST_TRAINED of about `characters`, spread evenly."""
        seen = used = number = first = 0
        chosen = np.zeros(0, bool)  # of the documents from `first` on: whether they are in train
        for piece in self._pieces(PIECE, False, advance):
            text = piece.text
            if split.by_position:
                text = text[: max(0, split.limits[0] - seen)]
            else:
                if number >= first + len(chosen):
                    first = number
                    chosen = split.of_documents(np.arange(first, min(first + AT_ONCE, split.documents))) == 0
                text = text if chosen[number - first] else ""
            number += piece.is_last
            seen += len(text)
            if text and used * characters <= seen * MOST_TRAINED:
                used += len(text)
                yield text

    def groups(self, tokenizer: Tokenizer, advance: Advance) -> Iterator[Group]:
        """All texts in order, in groups of about GROUP characters whose ids, one after the other, are the ids of the texts."""
        anywhere = isinstance(tokenizer, UnitTokenizer)
        group, size = Group([], [], 0), 0
        for piece in self._pieces(PIECE if tokenizer.cuts else UNCUT, not tokenizer.cuts, advance):
            group.texts.append(piece.text)
            group.ends.append(piece.is_last)
            group = group._replace(cuts=group.cuts + (piece.may_differ and not anywhere))
            size += len(piece.text)
            if size >= GROUP:
                yield group
                group, size = Group([], [], 0), 0
        if group.texts:
            yield group

    def _pieces(self, size: int, may_differ: bool, advance: Advance) -> Iterator[Piece]:
        """All texts, in pieces of `size` characters or a little more. `may_differ`: a cut at white space may change ids, too."""
        for number in range(len(self.files)):
            held = ""
            for text, is_last in self._fragments(number, advance):
                parts: list[tuple[str, bool]] = []
                for part in pieces(held + text, size):
                    while len(part) > size + LONGEST_WORD:
                        parts.append((part[:LONGEST_WORD], True))
                        part = part[LONGEST_WORD:]
                    parts.append((part, may_differ))
                held = parts.pop()[0]
                yield from (Piece(part, False, differs) for part, differs in parts)
                if is_last and held:
                    yield Piece(held, True, False)
                    held = ""
