"""What is being served: a model under its name, with its tokenizer, its room and its bounds; and what a request asks of it."""

import secrets
from dataclasses import dataclass
from typing import Any

from models.config import GPT
from models.inference.sampling_params import SamplingParams
from parallel.errors import Mistake
from research.data.tokenizer import Tokenizer
from research.generation.settings import GenerationSettings, refuse_long, text_seed
from research.serving.access import Access
from research.serving.chat_template import Conversation
from research.serving.engine import Job
from research.serving.errors import ApiError, wrong
from research.serving.limits import Limits
from research.serving.prometheus import Metrics
from research.serving.request_queue import RequestQueue
from research.serving.requests import Common


@dataclass(frozen=True)
class Service:
    """Everything that an answer needs to know. None of it changes while the server runs, but for the desk."""

    name: str
    """The run's title: what `model` says."""
    step: int
    """Of the checkpoint."""
    precision: str
    created: int
    """When the server began, in seconds since 1970."""
    model: GPT
    tokenizer: Tokenizer
    context: int
    slots: int
    ends: tuple[int, ...]
    conversation: Conversation
    limits: Limits
    access: Access
    metrics: Metrics
    desk: RequestQueue

    @property
    def fingerprint(self) -> str:
        """What decides a text beside the request: the same seed and the same fingerprint give the same text."""
        return f"{self.name}-{self.step}-{self.precision}"

    def card(self) -> dict[str, Any]:
        """What /v1/models says of it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "tessera",
            "context": self.context,
            "step": self.step,
            "precision": self.precision,
            "slots": self.slots,
            "chat_template": self.conversation.name,
        }

    def refuse_other(self, name: str | None) -> None:
        """A Refusal for a model that is not here. A request that names none means this one."""
        if name not in (None, self.name):
            raise ApiError(404, f"model {str(name)[:100]!r} is not here → use {self.name}", "model", "model_not_found")

    def asks(self, asked: Common, stops: tuple[str, ...], tokens: int, logprobs: int | None, number: int = 0) -> list[GenerationSettings]:
        """What is asked for each of the `n` texts of prompt `number`."""
        if asked.n > self.limits.n:
            raise wrong("n", f"= {asked.n} is more than {self.limits.n} → ask for fewer")
        if logprobs is not None and logprobs > self.limits.logprobs:
            name = "top_logprobs" if "top_logprobs" in type(asked).model_fields else "logprobs"
            raise wrong(name, f"= {logprobs} is more than {self.limits.logprobs} → ask for fewer")
        if len(asked.stop) > self.limits.stops:
            raise wrong("stop", f"holds {len(asked.stop)} strings, more than {self.limits.stops} → send fewer")
        if any(len(stop) > self.limits.stop_length for stop in asked.stop):
            raise wrong("stop", f"holds a string of more than {self.limits.stop_length} characters → send shorter ones")
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        stops = tuple(dict.fromkeys((*asked.stop, *stops)))
        return [GenerationSettings(tokens, choice(asked), text_seed(seed, number, i), stops, logprobs) for i in range(asked.n)]

    def jobs(self, ids: tuple[int, ...], asks: list[GenerationSettings], ends: tuple[int, ...], source: str, length: str) -> list[Job]:
        """A job for each text; a Refusal where they do not fit into the context.

        `source` is the field that the prompt came from, `length` the one that said how long a text may be.
        """
        try:
            refuse_long(len(ids), asks[0].max_new_tokens, self.context, self.model)
        except Mistake as mistake:
            said = str(mistake).replace("max_new_tokens", "max_tokens").replace("use context", "start the server with --context")
            param = length if len(ids) < self.context else source
            raise ApiError(400, f"{param}: {said}", param, "context_length_exceeded") from None
        return [Job(ids, ask, ends) for ask in asks]

    def left(self, ids: tuple[int, ...]) -> int:
        """Tokens that the context leaves behind a prompt; at least 1, so that a prompt which is too long is refused as such."""
        return max(1, self.context - len(ids))


def choice(asked: Common) -> SamplingParams:
    """How tokens are chosen. At temperature 0 the others leave the likeliest token where it is: they ask for nothing."""
    if asked.temperature == 0:
        return SamplingParams(repetition_penalty=float(asked.repetition_penalty))
    return SamplingParams(float(asked.temperature), asked.top_k, float(asked.top_p), float(asked.min_p), float(asked.repetition_penalty))
