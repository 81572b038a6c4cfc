"""Continuous batching: requests enter free rows of a decoder as others leave them; each step writes one token of every one.

Ids in, ids out; text is research/writing.py's. A request's tokens depend on what it asks for, not on its company (models/inference/sampling.py).
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from models.inference.sampling import Row, log_probabilities, next_tokens, refuse_non_finite
from models.inference.sampling_params import GREEDY, SamplingParams

END, STOP, LENGTH, CANCELLED = "end_of_text", "stop", "length", "cancelled"
"""Why a text ended: by the model, before a stop string, with as many tokens as were asked for, because nobody wanted it any more."""


class DecoderLike(Protocol):
    """A Decoder, on one rank or on many."""

    @property
    def free(self) -> int:
        """Rows that are not in use."""

    def admit(self, prompts: list[tuple[int, ...]]) -> Tensor:
        """As Decoder's."""

    def step(self, ids: list[int]) -> Tensor:
        """As Decoder's."""

    def drop(self, row: int) -> None:
        """As Decoder's."""


@dataclass(frozen=True)
class Request:
    """What is to be written, and after which tokens."""

    prompt: tuple[int, ...]
    """At least one id."""
    max_new_tokens: int
    choice: SamplingParams = GREEDY
    seed: int = 0
    """With the number of a token it decides the draw, so the same request gives the same text."""
    ends: Collection[int] = ()
    """Ids that end the text; they are counted among its tokens."""
    logprobs: int | None = None
    """How many likeliest tokens to record beside each one written, 0: that one alone, None: nothing."""


@dataclass(eq=False)
class Generation:
    """A request and what has been written for it."""

    request: Request
    ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    """Of each id: its log-probability, and those of the likeliest as (id, log-probability)."""
    finish: str | None = None
    """Why it ended; None while it goes on."""

    def row(self) -> Row:
        """What decides the next token."""
        return Row(self.request.choice, self.request.seed, self.request.prompt, self.ids)

    def take(self, token: int) -> None:
        """One more token."""
        self.ids.append(token)
        if token in self.request.ends:
            self.finish = END
        elif len(self.ids) == self.request.max_new_tokens:
            self.finish = LENGTH


class BatchScheduler:
    """The requests of one decoder: `submit` at any time, `step` as long as any is left. Not for several threads at once."""

    def __init__(self, decoder: DecoderLike, vocab_size: int) -> None:
        """Only ids below `vocab_size` are written: a model may have more rows than its tokenizer has tokens."""
        self.decoder, self.vocab_size = decoder, vocab_size
        self.waiting: deque[Generation] = deque()
        self.live: list[Generation] = []
        """By the decoder's row."""

    def __bool__(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.waiting or self.live)

    def submit(self, request: Request) -> Generation:
        """Queues a request; what is returned fills with every step."""
        written = Generation(request)
        self.waiting.append(written)
        return written

    def end(self, written: Generation, why: str) -> None:
        """Ends a request between two steps, for a reason that the batch does not know of: a stop string, a client that has gone."""
        if written in self.waiting:
            self.waiting.remove(written)
        elif written in self.live:
            self._leave(self.live.index(written))
        written.finish = why

    def step(self) -> list[Generation]:
        """A token of every request in a row; where rows are free and requests wait, the first token of as many of those instead.

        Returns the ones that got a token. Those with a `finish` have left.
        """
        coming = [self.waiting.popleft() for _ in range(min(self.decoder.free, len(self.waiting)))]
        if coming:
            first = len(self.live)
            self.live += coming
            logits = self.decoder.admit([written.request.prompt for written in coming])
            refuse_non_finite(logits)
        else:
            first, coming = 0, list(self.live)
            logits = self.decoder.step([written.ids[-1] for written in coming])
        self._choose(logits[:, : self.vocab_size], coming)
        for row in reversed(range(first, len(self.live))):
            if self.live[row].finish:
                self._leave(row)
        return coming

    def _choose(self, logits: Tensor, asked: list[Generation]) -> None:
        tokens = next_tokens(logits, [written.row() for written in asked])
        tops = [written.request.logprobs for written in asked]
        told = log_probabilities(logits, tokens, max(top or 0 for top in tops)) if any(top is not None for top in tops) else []
        for i, (written, token) in enumerate(zip(asked, tokens, strict=True)):
            if (top := tops[i]) is not None:
                written.logprobs.append((told[i][0], told[i][1][:top]))
            written.take(token)

    def _leave(self, row: int) -> None:
        """Frees the row; the last one takes its place, here as in the decoder."""
        self.decoder.drop(row)
        last = self.live.pop()
        if row < len(self.live):
            self.live[row] = last
