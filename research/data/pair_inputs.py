"""Pairs as documents: the source's tokens, the separator, the target's tokens and end-of-text; and the files that `prepare --pairs` reads.

The separator is put between the sides as a token. Its letters in a text are letters, so no text can hold one.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from parallel.errors import Mistake
from parallel.text import json_value
from research.data.example_inputs import ExampleInputs
from research.data.pair_text import EXAMPLE, Pair, pair_of
from research.data.rendered_text import RenderedText
from research.data.special_tokens import SEPARATOR
from research.data.text_files import LINES, Advance, Fragment, Reading, TextFile
from research.data.tokenizer import Tokenizer

WITH_SEPARATOR = "builtin:bpe-8192+sep"


def rendered(pair: Pair, separator: str) -> RenderedText:
    """The document of a pair: its target, end-of-text included, is what is to be learned."""
    begin = len(pair.source) + len(separator)
    parts = ((pair.source, True), (separator, False), (pair.target, True))
    return RenderedText(pair.place, parts, ((begin, begin + len(pair.target)),), ends=True)


def separator_of(tokenizer: Tokenizer, separator: str = SEPARATOR) -> int:
    """The id of the separator. A Mistake if the tokenizer has no such special token."""
    number = tokenizer.backend.token_to_id(separator)
    if number is None or number in tokenizer.encode(separator):
        raise Mistake(
            f"pairs need the special token {separator!r:.60}, which the tokenizer {tokenizer.name} does not have → use one that is made "
            f"with it, such as {WITH_SEPARATOR}, or name another token of it"
        )
    return number


class PairForm:
    """The Form of pairs (conversations.py), as far as `prepare` asks for it."""

    name, template = "pairs", None

    def __init__(self, separator: str) -> None:
        self.separator = separator
        self.identity = f"pairs {separator}"


class PairInputs(ExampleInputs):
    """Pairs to prepare: files of JSON lines, or two files of plain text with the same number of lines, the first one the sources."""

    form: PairForm  # type: ignore[assignment]

    def __init__(self, names: Sequence[str], root: Path, reading: Reading, form: PairForm) -> None:
        self.are_aligned = len(names) == 2 and not any(TextFile(Path(name), name).kind == LINES for name in names)
        super().__init__(names, root, reading, form)  # type: ignore[arg-type]

    def _keep_lines(self, names: Sequence[str]) -> None:
        """As of ExampleInputs, but for two files of plain text."""
        if not self.are_aligned:
            super()._keep_lines(names)
        elif len(self.files) != 2 or any(file.name not in names for file in self.files):
            raise Mistake(f"{names[0]} and {names[1]} are not two files → name one file of each language, or a folder of {LINES} files")

    def _fragments(self, number: int, advance: Advance) -> Iterator[Fragment]:
        return (Fragment(pair.text, True) for pair in self._pairs(number, advance))

    def _rendered(self, number: int, advance: Advance) -> Iterator[RenderedText]:
        return (rendered(pair, self.form.separator) for pair in self._pairs(number, advance))

    def _pairs(self, number: int, advance: Advance) -> Iterator[Pair]:
        """The pairs of a file; of two aligned files, all with the first one."""
        if not self.are_aligned:
            for place, line in self._unchanged(number, self.files[number].lines(self.reading, self.left, advance)):
                yield pair_of(json_value(line, place, f"one object a line: {EXAMPLE}"), place, self.reading, self.left)
        elif number == 0:
            columns = (self._unchanged(i, file.all_lines(self.reading, self.left, advance)) for i, file in enumerate(self.files))
            yield from _aligned(zip_longest(*columns), [file.name for file in self.files])


def _aligned(lines: Iterable[tuple[tuple[str, str] | None, ...]], names: Sequence[str]) -> Iterator[Pair]:
    """The pairs of the (place, line)s of two files. A Mistake if a line is empty, or a file has more of them than the other."""
    counts = [0, 0]
    for source, target in lines:
        counts = [counts[0] + (source is not None), counts[1] + (target is not None)]
        if source is None or target is None:
            continue
        for place, line in (source, target):
            if not line.strip():
                raise Mistake(f"{place} is empty → leave it out of both files, or write both sides")
        yield Pair(source[0], source[1], target[1])
    if counts[0] != counts[1]:
        raise Mistake(
            f"{names[0]} has {counts[0]:,} lines and {names[1]} {counts[1]:,} → let line i of one file be the translation of line i of "
            "the other"
        )
