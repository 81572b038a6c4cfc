"""The model of one evaluation, restored when it is first needed: as a scorer or as a generator, never as both at once."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from models.config import GPT
from models.encoder_config import T5
from models.inference.scoring import TokenScorer
from parallel.errors import Mistake
from research.cluster.tensor_ranks import opened
from research.data.tokenizer import Tokenizer
from research.evaluation.scorer import Score, ScoreRequest
from research.evaluation.task import TextRequest
from research.generation.generator import TextGenerator
from research.generation.restore import DecoderSpec, ScorerSpec
from research.generation.settings import GenerationSettings
from research.generation.sources import SourceForm


@dataclass(frozen=True)
class RestoredScorer:
    """Scores requests of similar lengths together. Runs on rank 0; the other tensor ranks follow it."""

    scores: TokenScorer
    length: int
    """The maximum number of tokens of a request, of which the last is not read."""
    batch: int
    """The number of requests of the maximum length that are scored at once, or as many tokens of shorter ones."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score per request, in order."""
        scores: dict[int, Score] = {}
        for batch in batches([len(request.ids) for request in requests], self.batch * self.length):
            counts = [requests[i].scored for i in batch]
            logprobs, greedy = self.scores.score([requests[i].ids for i in batch], counts)
            for i, its_logprobs, its_greedy in zip(batch, logprobs.split(counts), greedy.split(counts), strict=True):
                scores[i] = Score(tuple(its_logprobs.tolist()), tuple(its_greedy.tolist()))
        return [scores[i] for i in range(len(requests))]


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Splits the indices of `lengths` into batches, the longest first: batch size times maximum length ≤ `tokens`, or one index alone."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@dataclass
class Session:
    """A context manager that owns the restored model and its other tensor ranks, and ends them on exit."""

    run: Path
    checkpoint: Path | None
    """None: the initial weights of the run's seed."""
    model: GPT | T5
    tokenizer: Tokenizer
    precision: str | None
    tensor: int
    batch: int
    warn: Callable[[str], object] = lambda line: None
    """Shows a line to the user."""
    source: SourceForm | None = None
    """As of TextGenerator."""
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _scorer: RestoredScorer | None = None
    _generator: TextGenerator | None = None

    @property
    def length(self) -> int:
        """The maximum number of tokens of a request: what the model was trained to read, and the token after it."""
        return self.model.seq_length + 1

    @property
    def scorer(self) -> RestoredScorer:
        """The model as a scorer; releases a generator first."""
        if self._scorer is None:
            self.close()
            assert self.checkpoint is not None
            spec = ScorerSpec(self.run, self.checkpoint, self.precision)
            self._scorer = RestoredScorer(self._stack.enter_context(opened(spec, self.tensor)), self.length, self.batch)
        return self._scorer

    @property
    def generator(self) -> TextGenerator:
        """The model as a generator of `batch` texts at once, as long as the model was trained to read; releases a scorer first."""
        return self.generator_of(self.model.seq_length)

    def generator_of(self, context: int) -> TextGenerator:
        """The model as a generator of texts of at most `context` tokens each; releases a scorer, or another generator, first.

        So many texts are generated at once as have the tokens of `batch` texts of full length.
        """
        if self._generator is None or self._generator.context != context:
            self.close()
            slots = max(1, self.batch * self.model.seq_length // context)
            start = None if self.source is None else self.source.start
            spec = DecoderSpec(self.run, self.checkpoint, self.precision, slots, context, start)
            decoder = self._stack.enter_context(opened(spec, self.tensor))
            if decoder.uncached:
                self.warn(decoder.uncached)
            self._generator = TextGenerator(decoder, self.tokenizer, self.model, context, source=self.source)
        return self._generator

    def untrained(self) -> "Session":
        """A session of the same model with its initial weights. Releases the model of this one."""
        self.close()
        return Session(self.run, None, self.model, self.tokenizer, self.precision, self.tensor, self.batch, self.warn, self.source)

    def texts(self, requests: Sequence[TextRequest], progress: Callable[[int], object] = lambda n: None, beams: int = 1) -> list[str]:
        """The text that the model writes for each request, in order. Calls `progress(n)` after n more texts.

        With several beams, each is the best text of a beam search.
        """
        if beams > 1:
            return [self._best_beam(request, beams, progress) for request in requests]
        generator = self.generator
        texts = [generator.submit_ids(one.ids, GenerationSettings(one.max_new_tokens), one.ends) for one in requests]
        while generator:
            progress(sum(text.finish is not None for text in generator.step()))
        return [text.text for text in texts]

    def _best_beam(self, request: TextRequest, beams: int, progress: Callable[[int], object]) -> str:
        if beams > self.batch:
            raise Mistake(f"--beams {beams} needs as many texts at once, and --batch is {self.batch} → use --batch {beams} or more")
        settings = GenerationSettings(request.max_new_tokens)
        [text] = self.generator.search_ids(request.ids, settings, request.ends, beams, 1)
        progress(1)
        return text.text

    def close(self) -> None:
        """Releases the model."""
        self._scorer = self._generator = None
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self._scorer = self._generator = None
        self._stack.__exit__(*error)
