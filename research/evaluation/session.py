"""The model of one evaluation, opened when it is first needed: to score, or to write, and never both at once."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from models.config import GPT
from research.data.tokenizer import Tokenizer
from research.restore import Plan, ScoringPlan
from research.restored_scorer import RestoredScorer
from research.tensor_ranks import opened
from research.writer import Writer


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
    _writer: Writer | None = None

    @property
    def length(self) -> int:
        """Tokens of a request: what the model was trained to read, and the one after it."""
        return self.model.seq_length + 1

    @property
    def scorer(self) -> RestoredScorer:
        """The model as a scorer; a writer is let go of first."""
        if self._scorer is None:
            self.close()
            scores = self._stack.enter_context(opened(ScoringPlan(self.run, self.checkpoint, self.precision), self.tensor))
            self._scorer = RestoredScorer(scores, self.length, self.batch)
        return self._scorer

    @property
    def writer(self) -> Writer:
        """The model as a writer of `batch` texts at once; a scorer is let go of first."""
        if self._writer is None:
            self.close()
            context = self.model.seq_length
            decoder = self._stack.enter_context(opened(Plan(self.run, self.checkpoint, self.precision, self.batch, context), self.tensor))
            self._writer = Writer(decoder, self.tokenizer, self.model, context)
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
