"""Example prompts for the page: the first words of documents of the held-out text, which the model has not been trained on."""

from collections.abc import Iterable
from itertools import chain, islice, zip_longest
from pathlib import Path

from parallel.errors import Mistake
from research.data.documents import documents, paths

COUNT = 4
MOST_DOCUMENTS, MOST_LINES = 64, 64
"""Of the text that is read for prompts, and of each document."""
LARGEST = 64 * 2**20
"""Bytes of the text's files. A larger one would delay the start of the server."""
FEWEST_WORDS, MOST_WORDS, MOST_CHARACTERS = 3, 9, 56
"""Of a prompt."""
NEUTRAL = ("Once upon a time", "In the beginning", "The most important thing is", "There was")
"""For a run whose held-out text is not here."""


def example_prompts(validation: str, root: Path) -> tuple[str, ...]:
    """Up to COUNT prompts from the corpus that data.validation names; NEUTRAL if it cannot be read or has no line to begin with."""
    try:
        if sum(path.stat().st_size for path in paths(validation, root)) > LARGEST:
            return NEUTRAL
        return opening_words(documents(validation, root)) or NEUTRAL
    except Mistake:
        return NEUTRAL


def opening_words(texts: Iterable[str]) -> tuple[str, ...]:
    """The first words of every document's first line, then of their second lines, and so on, until there are COUNT.

    Of lines that begin alike only the first is taken.
    """
    pages = [islice(filter(_long_enough, text.splitlines()), MOST_LINES) for text in islice(texts, MOST_DOCUMENTS)]
    prompts: dict[str, str] = {}
    for line in chain.from_iterable(zip_longest(*pages)):
        if line is not None and len(prompts) < COUNT:
            words = line.split()
            prompts.setdefault(words[0].lower(), _shortened(words))
    return tuple(prompts.values())


def _long_enough(line: str) -> bool:
    return len(line.split()) >= FEWEST_WORDS


def _shortened(words: list[str]) -> str:
    """The first words, as many as make a prompt."""
    text = ""
    for word in words[:MOST_WORDS]:
        if text and len(text) + 1 + len(word) > MOST_CHARACTERS:
            break
        text = f"{text} {word}".strip()
    return text[:MOST_CHARACTERS]
