"""Pairs of a source and a target as users have them: lines of JSON with both."""

from typing import Any, NamedTuple

from parallel.errors import Mistake, listed_up_to
from research.data.text_files import MOST_NAMES, LeftOut, Reading, without_halves

SOURCE, TARGET = SIDES = ("source", "target")
"""The keys of a line of JSON."""
EXAMPLE = '{"source": "a sentence", "target": "ein Satz"}'


class Pair(NamedTuple):
    """A text and what is to be written for it, neither of them empty."""

    place: str
    """For messages to the user: 'pairs.jsonl, line 3'."""
    source: str
    target: str

    @property
    def text(self) -> str:
        """Both sides in lines of their own: what a tokenizer is trained on."""
        return f"{self.source}\n{self.target}"


def is_pair(value: Any) -> bool:
    """Whether a line's object has a side of a pair and is no document of another kind, with its text under "text"."""
    return isinstance(value, dict) and "text" not in value and any(side in value for side in SIDES)


def pair_of(value: Any, place: str, reading: Reading, left: LeftOut) -> Pair:
    """The pair of a line's object. A Mistake if a side is missing, no text, or empty."""
    if not isinstance(value, dict):
        raise Mistake(f"{place} is no object → write one a line: {EXAMPLE}")
    for side in SIDES:
        if side not in value:
            keys = f"its keys are {listed_up_to((repr(key)[:40] for key in value), MOST_NAMES)}" if value else "it has no key"
            raise Mistake(f'{place} has no "{side}": {keys} → write one object a line: {EXAMPLE}')
        if not isinstance(value[side], str):
            raise Mistake(f'{place}: "{side}" is no text → write one object a line: {EXAMPLE}')
        if not value[side].strip():
            raise Mistake(f'{place}: "{side}" is empty → leave the line out, or write both sides')
    return Pair(place, *(without_halves(value[side], place, reading, left) for side in SIDES))
