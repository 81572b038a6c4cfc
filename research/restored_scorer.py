"""A Scorer over a model restored from a checkpoint: requests of similar lengths together, so many tokens at once as asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from models.scores import Scores
from research.scorer import Asked, Scored


@dataclass(frozen=True)
class RestoredScorer:
    """Rank 0's; the other tensor ranks follow it."""

    scores: Scores
    length: int
    """Tokens of a request, at most; the last is not read."""
    batch: int
    """Requests of the greatest length that are scored at once, and as many tokens of shorter ones."""

    def score(self, asked: Sequence[Asked]) -> list[Scored]:
        """An answer to each, in order."""
        found: dict[int, Scored] = {}
        for places in batches([len(one.ids) for one in asked], self.batch * self.length):
            counts = [asked[i].scored for i in places]
            logp, greedy = self.scores.score([asked[i].ids for i in places], counts)
            parts = zip(places, logp.split(counts), greedy.split(counts), strict=True)
            found.update({i: Scored(tuple(one.tolist()), tuple(other.tolist())) for i, one, other in parts})
        return [found[i] for i in range(len(asked))]


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Every place once, the longest first, in lists: places times the greatest length is at most `tokens`, or the place is alone."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
