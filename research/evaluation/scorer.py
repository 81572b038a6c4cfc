"""The interface between evaluation tasks and a model: requests for the log-likelihood of tokens given the tokens before them.

Pure data, imports no torch. Two scorers implement it: a model restored from a checkpoint (session.py) and a live engine during
training (research/training/live_model.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ScoreRequest:
    """A sequence of tokens of which the last ones are to be scored, each given all tokens before it."""

    ids: tuple[int, ...]
    """At least two, at most as many as the scorer takes."""
    scored: int
    """How many tokens at the end are scored: 1 to len(ids) − 1, because nothing precedes the first token."""

    def __post_init__(self) -> None:
        if not 0 < self.scored < len(self.ids):
            raise ValueError(f"{self.scored} of {len(self.ids)} tokens cannot be scored: at least one, and not the first")


@dataclass(frozen=True)
class Score:
    """The scores of a request's scored tokens, in order."""

    logprobs: tuple[float, ...]
    """Log-probabilities in nats, fp32 values."""
    greedy: tuple[bool, ...]
    """Whether each token is the most likely one at its position."""

    @property
    def logprob(self) -> float:
        """The log-probability of all scored tokens together."""
        return sum(self.logprobs)


class Scorer(Protocol):
    """A model that scores requests of at most `length` tokens."""

    @property
    def length(self) -> int:
        """The maximum length of a request's `ids`: one more than the model reads, because the last token is only scored."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score per request, in order. Apart from rounding, a score does not depend on the other requests."""
