"""Scorers whose answers are known in advance, so that what tasks make of them can be computed without a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from research.evaluation.scorer import Score, ScoreRequest


@dataclass
class Bigram:
    """log p of a token depends on it and the one before it alone: the sum over a text is the same however it is cut into windows."""

    length: int = 33
    calls: list[int] = field(default_factory=list)
    """Requests of each call."""

    def score(self, asked: Sequence[ScoreRequest]) -> list[Score]:
        """Some negative numbers, some greedy tokens."""
        self.calls.append(len(asked))
        return [self.one(request) for request in asked]

    def one(self, request: ScoreRequest) -> Score:
        assert len(request.ids) <= self.length
        pairs = list(zip(request.ids, request.ids[1:], strict=False))[-request.scored :]
        return Score(tuple(logprob(*pair) for pair in pairs), tuple(greedy(*pair) for pair in pairs))


def logprob(before: int, token: int) -> float:
    """From −0.01 to −5."""
    return -0.01 - (before * 7919 + token * 104729) % 500 / 100


def greedy(before: int, token: int) -> bool:
    """For three tokens of four."""
    return (before * 31 + token * 17) % 4 != 0


@dataclass(frozen=True)
class Distance:
    """log p of a token is minus the number of tokens before it in its window."""

    length: int = 33

    def score(self, asked: Sequence[ScoreRequest]) -> list[Score]:
        """Exact."""
        found = []
        for request in asked:
            places = range(len(request.ids) - request.scored, len(request.ids))
            found.append(Score(tuple(-float(place) for place in places), (False,) * request.scored))
        return found
