"""The model that is served: its name, tokenizer, context, slots and limits, and the generation settings that a request asks for."""

import secrets
from dataclasses import dataclass
from typing import Any

from models.config import GPT
from models.encoder_config import T5
from models.inference.sampling_params import SamplingParams
from parallel.errors import Mistake
from research.data.fill_in_middle import Sentinels
from research.data.tokenizer import Tokenizer
from research.generation.chat_template import ChatTemplate, PlainTemplate
from research.generation.settings import GenerationSettings, refuse_long, text_seed
from research.generation.sources import SourceForm
from research.serving.access import Access
from research.serving.engine import Job
from research.serving.errors import ApiError, invalid_field
from research.serving.executor import BoundedExecutor
from research.serving.limits import Limits
from research.serving.prometheus import Metrics
from research.serving.request_queue import RequestQueue
from research.serving.requests import CommonFields
from research.serving.truncation import prompt_places


@dataclass(frozen=True)
class Service:
    """What the endpoints need to know about the server. Only the request queue changes while the server runs."""

    name: str
    """The run's title, which is the name of the model in requests and responses."""
    step: int
    """Of the checkpoint."""
    precision: str
    created: int
    """When the server was started, in seconds since 1970."""
    model: GPT | T5
    source: SourceForm | None
    """What surrounds prompts that are sources; None if texts continue their prompts."""
    tokenizer: Tokenizer
    context: int
    """Number of tokens that a prompt and its text may have together."""
    slots: int
    """Number of texts that are generated at once."""
    end_ids: tuple[int, ...]
    """The tokens that end a text of /v1/completions."""
    sentinels: Sentinels | None
    """The tokens that a prompt with a suffix is made of; None if the model was not trained to fill in a middle."""
    chat_template: PlainTemplate | ChatTemplate
    example_prompts: tuple[str, ...]
    """The page offers them to begin a text with."""
    limits: Limits
    access: Access
    metrics: Metrics
    request_queue: RequestQueue
    intake: BoundedExecutor
    """Parses bodies, tokenizes the prompts of completions, and writes responses."""
    conversations: BoundedExecutor
    """Lays out conversations. A chat template is slow at times, and completions do not wait for it."""

    @property
    def fingerprint(self) -> str:
        """What determines a text besides the request: with the same seed and fingerprint, a request gets the same text."""
        return f"{self.name}-{self.step}-{self.precision}"

    def model_card(self) -> dict[str, Any]:
        """The model's entry in /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "tessera",
            "context": self.context,
            "step": self.step,
            "precision": self.precision,
            "slots": self.slots,
            "chat_template": self.chat_template.name,
        }

    def page_data(self) -> dict[str, Any]:
        """What the page needs to know: the model, whether it can hold a conversation, and prompts for it to continue."""
        return {
            "model": self.model_card(),
            "has_chat_template": isinstance(self.chat_template, ChatTemplate),
            "prompts": self.example_prompts,
            "most_messages": self.limits.messages,
        }

    def check_model(self, name: str | None) -> None:
        """Raises an ApiError if a request names another model. A request may leave the name out."""
        if name not in (None, self.name):
            raise ApiError(404, f"model {str(name)[:100]!r} is not here → use {self.name}", "model", "model_not_found")

    def check_characters(self, count: int, param: str) -> None:
        """Raises an ApiError if the text of a request's field is too long to be tokenized beside the requests of others."""
        most = self.limits.characters
        if count > most:
            message = f"has {count} characters, more than {most} → send less, or start the server with --characters"
            raise invalid_field(param, message, "too_many_characters")

    def generation_settings(
        self, request: CommonFields, stops: tuple[str, ...], max_tokens: int, logprobs: int | None, number: int = 0
    ) -> list[GenerationSettings]:
        """The settings of each of the `n` texts of prompt `number`. Raises an ApiError if the request exceeds a limit.

        `stops` are added to the request's own stop strings.
        """
        if request.n > self.limits.n:
            raise invalid_field("n", f"= {request.n} is more than {self.limits.n} → ask for fewer")
        if logprobs is not None and logprobs > self.limits.logprobs:
            name = "top_logprobs" if "top_logprobs" in type(request).model_fields else "logprobs"
            raise invalid_field(name, f"= {logprobs} is more than {self.limits.logprobs} → ask for fewer")
        if len(request.stop) > self.limits.stops:
            raise invalid_field("stop", f"holds {len(request.stop)} strings, more than {self.limits.stops} → send fewer")
        if any(len(stop) > self.limits.stop_length for stop in request.stop):
            raise invalid_field("stop", f"holds a string of more than {self.limits.stop_length} characters → send shorter ones")

        # at temperature 0 the truncations never remove the likeliest token, so they are left out
        sampling = SamplingParams(repetition_penalty=float(request.repetition_penalty))
        if request.temperature != 0:
            sampling = SamplingParams(
                float(request.temperature), request.top_k, float(request.top_p), float(request.min_p), float(request.repetition_penalty)
            )
        seed = secrets.randbits(63) if request.seed is None else request.seed
        stops = tuple(dict.fromkeys((*request.stop, *stops)))
        return [GenerationSettings(max_tokens, sampling, text_seed(seed, number, i), stops, logprobs) for i in range(request.n)]

    def jobs(
        self, ids: tuple[int, ...], settings: list[GenerationSettings], end_ids: tuple[int, ...], prompt_field: str, length_field: str
    ) -> list[Job]:
        """A job for each text. Raises an ApiError if prompt and text do not fit into the context.

        The error names `prompt_field`, which the prompt came from, or `length_field`, which limits the length of a text.
        """
        try:
            refuse_long(len(ids), settings[0].max_new_tokens, self.context, self.model)
        except Mistake as mistake:
            message = str(mistake).replace("max_new_tokens", "max_tokens").replace("use context", "start the server with --context")
            param = length_field if len(ids) < self.context else prompt_field
            raise ApiError(400, f"{param}: {message}", param, "context_length_exceeded") from None
        return [Job(ids, each, end_ids) for each in settings]

    def tokens_left(self, ids: tuple[int, ...]) -> int:
        """Number of tokens that may follow a prompt; at least 1, so that a prompt that is too long is rejected by `jobs`.

        A source and its target have places of their own.
        """
        return max(1, self.context - (0 if isinstance(self.model, T5) else len(ids)))

    def prompt_places(self, max_tokens: int) -> int:
        """The places that a prompt may have in front of a text of `max_tokens`."""
        return self.model.source_length if isinstance(self.model, T5) else prompt_places(self.context, max_tokens)
