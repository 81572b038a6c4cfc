"""Continuous batching: requests enter free rows of a decoder while others are being generated, and leave as soon as they end.

Each step generates one token for every request in a row. Works on token ids; research/generation/generator.py handles text.
The tokens of a request do not depend on the other requests in the batch (models/inference/sampling.py).
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from models.inference.sampling import Row, log_probabilities, next_tokens, refuse_non_finite
from models.inference.sampling_params import GREEDY, SamplingParams

END, STOP, LENGTH, CANCELLED = "end_of_text", "stop", "length", "cancelled"
"""Why a generation ended: it reached an end id, a stop string or its maximum number of tokens, or its client cancelled it."""


class DecoderLike(Protocol):
    """What the scheduler needs of a decoder: models.inference.decoder.Decoder, or a live engine (research/training/live_model.py)."""

    @property
    def free(self) -> int:
        """The number of rows that are not in use."""

    def admit(self, prompts: list[tuple[int, ...]]) -> Tensor:
        """Puts each prompt into a free row, behind the rows in use; returns the logits after each, 'n v'."""

    def step(self, ids: list[int]) -> Tensor:
        """Appends one id to every row, in order; returns the logits after each, 'n v'."""

    def drop(self, row: int) -> None:
        """Frees a row; the last row takes its place."""

    def continued(self, prompt: Sequence[int]) -> Sequence[int]:
        """The tokens that the new ones continue: the prompt, or for an encoder–decoder its start token."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue and how to continue it."""

    prompt: tuple[int, ...]
    """At least one id."""
    max_new_tokens: int
    sampling: SamplingParams = GREEDY
    seed: int = 0
    """The seed and a token's position decide its draw, so the same request always gets the same tokens."""
    ends: Collection[int] = ()
    """Ids that end the generation. The end id itself is part of the generated ids."""
    logprobs: int | None = None
    """How many of the most likely tokens to record beside each generated one; 0: the generated one only; None: record nothing."""


@dataclass(eq=False)
class Generation:
    """A request and what has been generated for it so far."""

    request: Request
    ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    """For each id its log-probability, and the most likely tokens as (id, log-probability)."""
    finish: str | None = None
    """Why it ended; None while it is running."""


class BatchScheduler:
    """Schedules requests on one decoder: `submit` at any time, call `step` while any is left. Not thread-safe."""

    def __init__(self, decoder: DecoderLike, vocab_size: int) -> None:
        """Generates only ids below `vocab_size`: a model may have more embedding rows than its tokenizer has tokens."""
        self.decoder, self.vocab_size = decoder, vocab_size
        self.waiting: deque[Generation] = deque()
        self.live: list[Generation] = []
        """The running generations, in the order of the decoder's rows."""

    def __bool__(self) -> bool:
        return bool(self.waiting or self.live)

    def submit(self, request: Request) -> Generation:
        """Queues a request and returns its generation, which `step` fills."""
        generation = Generation(request)
        self.waiting.append(generation)
        return generation

    def end(self, generation: Generation, finish: str) -> None:
        """Ends a generation between two steps for a reason that the scheduler cannot see: a stop string, a client that disconnected."""
        if generation in self.waiting:
            self.waiting.remove(generation)
        elif generation in self.live:
            self._free_row(self.live.index(generation))
        generation.finish = finish

    def step(self) -> list[Generation]:
        """Generates one token for every running request; if rows are free and requests wait, admits those and generates their first token.

        Returns the generations that got a token. Those with a `finish` have left their row.
        """
        stepped = [self.waiting.popleft() for _ in range(min(self.decoder.free, len(self.waiting)))]
        if stepped:
            first = len(self.live)
            self.live += stepped
            logits = self.decoder.admit([generation.request.prompt for generation in stepped])
            refuse_non_finite(logits)
        else:
            first, stepped = 0, list(self.live)
            logits = self.decoder.step([generation.ids[-1] for generation in stepped])

        self._append_tokens(logits[:, : self.vocab_size], stepped)

        for row in reversed(range(first, len(self.live))):
            if self.live[row].finish:
                self._free_row(row)
        return stepped

    def _append_tokens(self, logits: Tensor, generations: list[Generation]) -> None:
        """Chooses the next token of each generation from its row of logits, and ends those that are complete."""
        rows = [Row(one.request.sampling, one.request.seed, self.decoder.continued(one.request.prompt), one.ids) for one in generations]
        tokens = next_tokens(logits, rows)

        recorded = [one.request.logprobs for one in generations if one.request.logprobs is not None]
        logprobs = log_probabilities(logits, tokens, max(recorded)) if recorded else []

        for i, (generation, token) in enumerate(zip(generations, tokens, strict=True)):
            request = generation.request
            if request.logprobs is not None:
                logprob, top = logprobs[i]
                generation.logprobs.append((logprob, top[: request.logprobs]))
            generation.ids.append(token)
            if token in request.ends:
                generation.finish = END
            elif len(generation.ids) == request.max_new_tokens:
                generation.finish = LENGTH

    def _free_row(self, row: int) -> None:
        """Frees the row; the last one takes its place, here as in the decoder."""
        self.decoder.drop(row)
        last = self.live.pop()
        if row < len(self.live):
            self.live[row] = last
