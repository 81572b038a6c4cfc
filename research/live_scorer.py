"""A Scorer over a live engine: what an evaluation asks in the middle of training, answered on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass

from research.live import Live
from research.scorer import Asked, Scored


@dataclass(frozen=True)
class LiveScorer:
    """research/scorer.py's Scorer. `score` is collective: every rank asks for the same and gets all answers."""

    live: Live

    @property
    def length(self) -> int:
        """seq_length, and one more: the last token is predicted, not read."""
        return self.live.model.seq_length + 1

    def score(self, asked: Sequence[Asked]) -> list[Scored]:
        """Sequences of alike lengths pass together, the longest first. CutShort where somebody asked to stop."""
        left = sorted(range(len(asked)), key=lambda i: -len(asked[i].ids))  # stable: the same order on every rank
        found: dict[int, Scored] = {}
        while left:
            size = self.live.room(len(asked[left[0]].ids) - 1)
            together, left = left[:size], left[size:]
            for i, (logprobs, greedy) in zip(together, self.live.scores([asked[i].ids for i in together]), strict=True):
                count = asked[i].scored
                found[i] = Scored(tuple(logprobs[-count:]), tuple(greedy[-count:]))
        return [found[i] for i in range(len(asked))]
