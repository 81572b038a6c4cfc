"""The examples that a supervised corpus is prepared from: lines of JSON, rendered as text with the places of the responses."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parallel.errors import Mistake
from research.data import corpus_inputs
from research.data.conversations import Form, conversation_of
from research.data.corpus_inputs import Inputs
from research.data.random_split import Part
from research.data.rendered_text import RenderedText
from research.data.text_files import LINES, Advance, Fragment, Reading
from research.data.token_store import SHORT_VOCABULARY
from research.data.tokenizer import Tokenizer


class ExampleGroup(NamedTuple):
    """Examples that are tokenized together."""

    texts: list[RenderedText]
    cuts: int = 0
    """As of Group: no text is cut."""


class ExampleInputs(Inputs):
    """Files of JSON lines, each a conversation. Its text is rendered whenever it is read: in the first reading, and to be tokenized."""

    form: Form

    def __init__(self, names: Sequence[str], root: Path, reading: Reading, form: Form) -> None:
        """As of Inputs. Files of other kinds are left out of folders; one that is named itself is a Mistake."""
        super().__init__(names, root, reading)
        self.form = form
        self._keep_lines(names)
        self.file_bytes = sum(size for _, size, _ in self.states)

    def _keep_lines(self, names: Sequence[str]) -> None:
        """Leaves out what is no file of JSON lines. A Mistake if the user has named it, or if nothing is left."""
        for file in self.files:
            if file.kind != LINES and file.name in names:
                raise Mistake(f"{file.path} is no {LINES} file, which examples are read from → write one JSON object a line into a {LINES}")
        kept = [file.kind == LINES for file in self.files]
        if others := kept.count(False):
            self.left.leave_out(f"not {LINES}", others)
        if not any(kept):
            raise Mistake(f"{names[0]} has no {LINES} file: {self.left.sentence()} → name a folder that has one")
        self.files = [file for file, keep in zip(self.files, kept, strict=True) if keep]
        self.states = [state for state, keep in zip(self.states, kept, strict=True) if keep]

    def identity(self) -> str:
        """As of Inputs: the form belongs to it."""
        return hashlib.sha256(f"{super().identity()} {self.form.identity}".encode()).hexdigest()

    def _fragments(self, number: int, advance: Advance) -> Iterator[Fragment]:
        return (Fragment(text.text, True) for text in self._rendered(number, advance))

    def _rendered(self, number: int, advance: Advance) -> Iterator[RenderedText]:
        for place, line in self._unchanged(number, self.files[number].lines(self.reading, self.left, advance)):
            yield self.form.render(conversation_of(line, place, self.reading, self.left))

    def example_groups(self, advance: Advance) -> Iterator[ExampleGroup]:
        """All examples in order, in groups of about corpus_inputs.GROUP characters."""
        texts: list[RenderedText] = []
        size = 0
        for number in range(len(self.files)):
            for text in self._rendered(number, advance):
                texts.append(text)
                size += len(text.text)
                if size >= corpus_inputs.GROUP:
                    yield ExampleGroup(texts)
                    texts, size = [], 0
        if texts:
            yield ExampleGroup(texts)


def parts_of_examples(
    groups: Iterable[tuple[list[np.ndarray], ExampleGroup]], own: Tokenizer, size: int
) -> Iterator[tuple[Part, int, int]]:
    """Parts of `size` tokens or a little more, with the mask, each with its number of groups and of cuts, which is 0."""
    dtype = np.dtype("<u2" if own.vocab_size < SHORT_VOCABULARY else "<i4")
    arrays: list[np.ndarray] = []
    num_bytes: list[int] = []
    tokens = count = 0

    def part() -> tuple[Part, int, int]:
        ids, mask = np.concatenate(arrays, axis=1)
        lengths = np.array([array.shape[1] for array in arrays], np.int64)
        return Part(ids.astype(dtype), lengths, np.array(num_bytes, np.int64), False, mask.astype(np.uint8)), count, 0

    for found, group in groups:
        arrays += found
        num_bytes += [len(text.text.encode("utf-8")) for text in group.texts]
        tokens, count = tokens + sum(array.shape[1] for array in found), count + 1
        if tokens >= size:
            yield part()
            arrays, num_bytes, tokens, count = [], [], 0, 0
    if arrays:
        yield part()
