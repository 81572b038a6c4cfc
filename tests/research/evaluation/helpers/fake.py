"""Scorers whose scores follow a formula, so that the metrics can be computed without a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from research.evaluation.scorer import Score, ScoreRequest


@dataclass
class Bigram:
    """log p of a token depends only on it and the token before it: the sum over a text is the same for all windows."""

    length: int = 33
    calls: list[int] = field(default_factory=list)
    """The number of requests in each call."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        self.calls.append(len(requests))
        scores = []
        for request in requests:
            assert len(request.ids) <= self.length
            pairs = list(zip(request.ids, request.ids[1:], strict=False))[-request.scored :]
            scores.append(Score(tuple(logprob(*pair) for pair in pairs), tuple(greedy(*pair) for pair in pairs)))
        return scores


def logprob(before: int, token: int) -> float:
    """From −0.01 to −5."""
    return -0.01 - (before * 7919 + token * 104729) % 500 / 100


def greedy(before: int, token: int) -> bool:
    """True for three tokens of four."""
    return (before * 31 + token * 17) % 4 != 0


@dataclass(frozen=True)
class Distance:
    """log p of a token is minus the number of tokens before it in its window."""

    length: int = 33

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        scores = []
        for request in requests:
            positions = range(len(request.ids) - request.scored, len(request.ids))
            scores.append(Score(tuple(-float(position) for position in positions), (False,) * request.scored))
        return scores
