"""`Mistake`, the error that a user is meant to read, and helpers for its sentence: the nearest name, a list of choices."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

SEPARATORS = re.compile(r"[.:/]")
"""Between the parts of a name: model.num_heads, builtin:state_of_the_union/train."""
NEAR, SURELY_NEAR = 0.75, 0.9
"""difflib's ratio of two spellings from which on one is suggested for the other; and what a beginning or a whole word counts."""
LONGEST_NAME = 200
"""Characters of a name from which on nothing is near it. A file of a stranger may hold one of a megabyte."""
SHORTEST_PART = 3
"""Letters from which on a beginning or a word of a name stands for the name."""


class Mistake(ValueError):
    """A setting, a file or a command that cannot work. The message is one sentence that ends in what would work.

    Rank 0 shows it as `error  <sentence>`, without a traceback, and the process exits with code 2 (research/launch.py does both).
    Example: `Mistake("parallel.tensor = 3 does not divide model.num_heads = 8 → use 1, 2, 4 or 8")`.
    """

    code = 2
    """The exit code of a process that it ends (research/cluster/exit_codes.py)."""


class DiskRefuses(Mistake):
    """A disk is full, over its quota, or cannot be written for another reason that may pass: the same command may work later."""

    code = 4


class Damaged(Mistake):
    """A file of a checkpoint is not what was written: another checkpoint of the run may be whole."""

    code = 5


class FolderLost(Mistake):
    """A run's folder is not this process's any more: it was deleted under the run, or another process has taken the run over."""

    code = 6


class SharedMistake(Mistake):
    """A Mistake that every rank of a launch raises with the same sentence, so that all end at once, with exit code `code`.

    `reports`: whether this rank is the one that shows it.
    """

    def __init__(self, text: str, reports: bool, code: int = Mistake.code) -> None:
        super().__init__(text)
        self.reports, self.code = reports, code


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `name` most likely stands for: the same last word, else the closest spelling; None if none is near.

    Near is a slip of the fingers (`temprature`), a beginning (`eval`), or a part of the words (`usage` for `include_usage`).
    """
    if len(name) > LONGEST_NAME:
        return None
    candidates = list(candidates)
    leaf = name.rpartition(".")[2]
    same_leaf = (candidate for candidate in candidates if candidate.rpartition(".")[2] == leaf)
    return next(same_leaf, None) or max(
        (candidate for candidate in candidates if _similarity(name, candidate) >= NEAR),
        key=lambda candidate: _similarity(name, candidate),
        default=None,
    )


def _parts(name: str) -> list[str]:
    """'--model.num-heads' -> ['model', 'num_heads']."""
    return SEPARATORS.split(name.lower().strip("-").replace("-", "_"))


def _similarity(name: str, candidate: str) -> float:
    """From 0 to 1. Of names in several parts, every part has to be similar, because long groups in common say nothing of the rest."""
    own, other = _parts(name), _parts(candidate)
    if 1 < len(other) < len(own) and own[: len(other)] == other:  # a setting with something behind it
        return NEAR
    if len(own) != len(other):
        own, other = own[-1:], other[-1:]
    return min(_part_similarity(part, known) for part, known in zip(own, other, strict=True))


def _part_similarity(part: str, known: str) -> float:
    if len(part) >= SHORTEST_PART and (known.startswith(part) or set(part.split("_")) <= set(known.split("_"))):
        return SURELY_NEAR
    return difflib.SequenceMatcher(None, known, part).ratio()


def listed_up_to(items: Iterable[Any], most: int) -> str:
    """The first `most` items, and how many more there are: 'a, b and 3 more'."""
    words = [str(item) for item in items]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def listed(items: Iterable[Any], last: str = "or") -> str:
    """The items as an English list: '1, 2, 4 or 8'."""
    words = [str(item) for item in items]
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
