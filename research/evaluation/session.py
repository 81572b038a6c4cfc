"""The model of one evaluation, opened when it is first needed: to score, or to write, and never both at once."""
# MERGED-DOC """A Scorer over a model restored from a checkpoint: requests of similar lengths together, so many tokens at once as asked for."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from models.config import GPT
from models.inference.scoring import TokenScorer
from research.cluster.tensor_ranks import opened
from research.data.tokenizer import Tokenizer
from research.evaluation.scorer import Score, ScoreRequest
from research.generation.generator import TextGenerator
from research.generation.restore import DecoderSpec, ScorerSpec


@dataclass(frozen=True)
class RestoredScorer:
    """Rank 0's; the other tensor ranks follow it."""

    scores: TokenScorer
    length: int
    """Tokens of a request, at most; the last is not read."""
    batch: int
    """Requests of the greatest length that are scored at once, and as many tokens of shorter ones."""

    def score(self, asked: Sequence[ScoreRequest]) -> list[Score]:
        """An answer to each, in order."""
        found: dict[int, Score] = {}
        for places in batches([len(one.ids) for one in asked], self.batch * self.length):
            counts = [asked[i].scored for i in places]
            logp, greedy = self.scores.score([asked[i].ids for i in places], counts)
            parts = zip(places, logp.split(counts), greedy.split(counts), strict=True)
            found.update({i: Score(tuple(one.tolist()), tuple(other.tolist())) for i, one, other in parts})
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


@dataclass
class Session:
    """A context manager; what it has opened ends with it, other tensor ranks included."""

    run: Path
    checkpoint: Path
    model: GPT
    tokenizer: Tokenizer
    precision: str | None
    tensor: int
    batch: int
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _scorer: RestoredScorer | None = None
    _writer: TextGenerator | None = None

    @property
    def length(self) -> int:
        """Tokens of a request: what the model was trained to read, and the one after it."""
        return self.model.seq_length + 1

    @property
    def scorer(self) -> RestoredScorer:
        """The model as a scorer; a writer is let go of first."""
        if self._scorer is None:
            self.close()
            scores = self._stack.enter_context(opened(ScorerSpec(self.run, self.checkpoint, self.precision), self.tensor))
            self._scorer = RestoredScorer(scores, self.length, self.batch)
        return self._scorer

    @property
    def writer(self) -> TextGenerator:
        """The model as a writer of `batch` texts at once; a scorer is let go of first."""
        if self._writer is None:
            self.close()
            context = self.model.seq_length
            decoder = self._stack.enter_context(
                opened(DecoderSpec(self.run, self.checkpoint, self.precision, self.batch, context), self.tensor)
            )
            self._writer = TextGenerator(decoder, self.tokenizer, self.model, context)
        return self._writer

    def close(self) -> None:
        """Lets go of the model."""
        self._scorer = self._writer = None
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self._scorer = self._writer = None
        self._stack.__exit__(*error)
