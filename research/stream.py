"""The text of a sequence that is being written, given out as soon as it is certain: whole characters, and never a stop string.

A token may end inside a character, and a stop string may begin in one token and end in a later one: such text is held back.
"""

from collections.abc import Iterable
from typing import Protocol

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
PENDING = 8
"""Tokens after which bytes that still are no character are given out as they are. A character has four bytes at most."""
BEFORE = 5
"""Tokens of the prompt that are decoded before the first new one: a tokenizer may drop a space at the very beginning of a text."""


class Decodes(Protocol):
    """A tokenizer."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no whole character become U+FFFD."""


class Stream:
    """Text of ids that come one by one. `stops`: strings at the first of which the text ends; it is not part of it."""

    def __init__(self, tokenizer: Decodes, prompt: Iterable[int], stops: Iterable[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.stopped = False
        self._ids = list(prompt)[-BEFORE:]
        self._known = len(self._ids)
        """How many of the ids have been given out; the text of those before is context."""
        self._base = tokenizer.decode(self._ids)
        self._held = ""

    @property
    def held(self) -> int:
        """Characters that are held back because a stop string may begin with them."""
        return len(self._held)

    def push(self, token: int) -> str:
        """One more id; what is certain now."""
        self._ids.append(token)
        text = self.tokenizer.decode(self._ids)
        if text.endswith(UNFINISHED) and len(self._ids) - self._known < PENDING:
            return ""
        new = text[len(self._base) :]
        self._ids = self._ids[self._known :]
        self._known, self._base = len(self._ids), self.tokenizer.decode(self._ids)
        return self._released(new)

    def finish(self) -> str:
        """No id follows: the rest, without a character that is left unfinished."""
        new = self.tokenizer.decode(self._ids)[len(self._base) :].rstrip(UNFINISHED)
        rest = self._released(new) + self._held
        self._held = ""
        return rest

    def _released(self, new: str) -> str:
        """Held and new text up to a stop string, or up to what may be the beginning of one."""
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
