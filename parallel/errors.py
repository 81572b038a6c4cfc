"""`Mistake`, the error that a user is meant to read, and helpers for its sentence: the nearest name, a list of choices."""

import difflib
from collections.abc import Iterable
from typing import Any


class Mistake(ValueError):
    """A setting, a file or a command that cannot work. The message is one sentence that ends in what would work.

    Rank 0 shows it as `error  <sentence>`, without a traceback, and the process exits with code 2 (research/launch.py does both).
    Example: `Mistake("parallel.tensor = 3 does not divide model.num_heads = 8 → use 1, 2, 4 or 8")`.
    """


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that the writer of `name` most likely meant: the same last word, else the closest spelling, else None."""
    candidates = list(candidates)
    leaves = {candidate.rpartition(".")[2]: candidate for candidate in reversed(candidates)}
    leaf = name.rpartition(".")[2]
    if leaf in leaves:
        return leaves[leaf]
    if close := difflib.get_close_matches(name, candidates, n=1):
        return close[0]
    close = difflib.get_close_matches(leaf, leaves, n=1)
    return leaves[close[0]] if close else None


def listed(items: Iterable[Any], last: str = "or") -> str:
    """The items as an English list: '1, 2, 4 or 8'."""
    words = [str(item) for item in items]
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
