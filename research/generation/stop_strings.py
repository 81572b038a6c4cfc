"""Finds the first of several stop strings in a text that arrives in pieces.

Each character is compared a constant number of times on average with each string, however long the strings are (the algorithm of
Knuth, Morris and Pratt): a client of the server chooses both the strings and, by its prompt, the text.
"""

from collections.abc import Iterable


class StopStringFinder:
    """Reads a text piece by piece; knows how much of its end may be the beginning of a stop string."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = [(stop, _failures(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)
        """For each string, how many of its first characters the text ends with."""

    @property
    def held(self) -> int:
        """How many characters at the text's end may be the beginning of a stop string."""
        return max(self._matched, default=0)

    def push(self, piece: str) -> int | None:
        """Reads a piece. Returns where the stop string that begins first begins, counted from the piece's first character.

        It is negative for one that begins in an earlier piece, and None if no stop string is complete.
        """
        begins = []
        for i, (stop, failures) in enumerate(self._stops):
            matched = self._matched[i]
            for end, letter in enumerate(piece, 1):
                while matched and stop[matched] != letter:
                    matched = failures[matched - 1]
                matched += stop[matched] == letter
                if matched == len(stop):
                    begins.append(end - matched)
                    break
            self._matched[i] = matched
        return min(begins, default=None)


def _failures(stop: str) -> list[int]:
    """For each beginning of `stop`, the length of its longest proper end that is a beginning of `stop` too."""
    failures, matched = [0], 0
    for letter in stop[1:]:
        while matched and stop[matched] != letter:
            matched = failures[matched - 1]
        matched += stop[matched] == letter
        failures.append(matched)
    return failures
