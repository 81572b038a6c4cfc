"""What an evaluation asks of a model: how likely is this text after that one? Pure data: no torch.

Tasks (research/evaluation/) ask it; who answers is a model restored from a checkpoint, or a live engine in the middle of training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ScoreRequest:
    """Tokens, and how many at their end are to be scored: each given all before it."""

    ids: tuple[int, ...]
    """At least two, at most as many as the scorer reads."""
    scored: int
    """From 1 to len(ids) − 1: the first token has nothing before it."""

    def __post_init__(self) -> None:
        if not 0 < self.scored < len(self.ids):
            raise ValueError(f"{self.scored} of {len(self.ids)} tokens cannot be scored: at least one, and not the first")


@dataclass(frozen=True)
class Score:
    """Of the tokens that were asked for, in order."""

    logprobs: tuple[float, ...]
    """Natural logarithms, fp32 values."""
    greedy: tuple[bool, ...]
    """Whether each token is the likeliest one at its place."""

    @property
    def logprob(self) -> float:
        """Of all of them together."""
        return sum(self.logprobs)


class Scorer(Protocol):
    """A model that reads at most `length` tokens at once."""

    @property
    def length(self) -> int:
        """The longest `ids` that may be asked for: one more than the model reads, because the last token is scored only."""

    def score(self, asked: Sequence[ScoreRequest]) -> list[Score]:
        """An answer to each, in order, the same whatever else is asked beside it (but for rounding)."""
