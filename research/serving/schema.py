"""What a request may contain: every field checked by type and by bounds, every other one refused by its name.

OpenAI's clients send null for what is not set, so null is absence. What OpenAI has and this server has not is refused unless it
is set to what the server does anyway; what only labels a request is accepted and dropped.
"""

import difflib
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from research.serving.refusal import Refusal, wrong

LABELS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
"""What changes nothing about the text."""
NEITHER: dict[str, tuple[Any, ...]] = {"logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,)}
"""Fields without a counterpart -> the values that ask for nothing."""
NOT_COMPLETIONS = NEITHER | {"suffix": ("",), "best_of": (1,)}
NOT_CHAT: dict[str, tuple[Any, ...]] = NEITHER | {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
}
NOT_MESSAGES = ("tool_calls", "function_call", "tool_call_id", "audio", "refusal", "annotations")
INSTEAD = dict.fromkeys(("presence_penalty", "frequency_penalty"), "repetition_penalty") | {"best_of": "n"}
SMALLEST_TEMPERATURE = 1e-3
"""Less of it, other than 0, would only overflow."""

Asked = TypeVar("Asked", bound="Common")


def _one_or_none(value: Any, handler: ValidatorFunctionWrapHandler) -> list[str]:
    """`stop` is a string or a list of some."""
    return handler([value] if isinstance(value, str) else value)


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted, and nothing is added: what is sent says how long it is."""


class Common(BaseModel):
    """What both endpoints take. Strict: no text where a number belongs, no truth value either."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    """OpenAI's default, not `generate`'s: 1 draws from the model's own distribution, 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.1, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], FailFast(), WrapValidator(_one_or_none)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _together(self) -> Self:
        if 0 < self.temperature < SMALLEST_TEMPERATURE:
            raise wrong("temperature", f"= {self.temperature} is between 0 and {SMALLEST_TEMPERATURE} → use 0, which is greedy")
        if self.stream_options and not self.stream:
            raise wrong("stream_options", "goes with stream = true only → leave it out")
        return self


class Completion(Common):
    """/v1/completions."""

    prompt: Any = "\n"
    """Text, ids, or a list of either: research/serving/completions.py."""
    logprobs: int | None = Field(None, ge=0)
    echo: bool = False

    @model_validator(mode="after")
    def _echo(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise wrong("echo", "with logprobs asks for the prompt's, which are not computed → leave one of them out", "unsupported")
        return self


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Any
    """Text, or a list of {"type": "text", "text": …}."""
    name: str | None = Field(None, max_length=256)


class Chat(Common):
    """/v1/chat/completions."""

    messages: list[Any] = Field(min_length=1)
    """Each checked by `message`."""
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise wrong("max_tokens", "and max_completion_tokens differ → send the second alone")
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs", "goes with logprobs = true only → send both")
        return self


def completion(value: dict[str, Any]) -> Completion:
    """The body of /v1/completions, or a Refusal."""
    return _checked(Completion, value, NOT_COMPLETIONS)


def chat(value: dict[str, Any]) -> Chat:
    """The body of /v1/chat/completions, or a Refusal."""
    return _checked(Chat, value, NOT_CHAT)


def message(value: Any, place: str) -> Message:
    """One message, or a Refusal; `place` is what it is called."""
    if not isinstance(value, dict):
        raise wrong(place, 'is no object → send {"role": "user", "content": "…"}')
    for name in NOT_MESSAGES:
        if value.get(name) not in (None, []):
            raise wrong(f"{place}.{name}", "is not supported → send text only", "unsupported_parameter")
    kept = {name: given for name, given in value.items() if given is not None and name not in NOT_MESSAGES}
    return _validated(Message, kept, f"{place}.")


def _checked(kind: type[Asked], value: dict[str, Any], unsupported: dict[str, tuple[Any, ...]]) -> Asked:
    given = {name: field for name, field in value.items() if field is not None and name not in LABELS}
    for name, neutral in unsupported.items():
        if name in given and not any(type(given[name]) in (type(same), float) and given[name] == same for same in neutral):
            instead = f"use {INSTEAD[name]} instead" if name in INSTEAD else "leave it out"
            raise wrong(name, f"is not supported → {instead}", "unsupported_parameter")
        given.pop(name, None)
    return _validated(kind, given)


Model = TypeVar("Model", bound=BaseModel)


def _validated(kind: type[Model], given: dict[str, Any], place: str = "") -> Model:
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _refusal(kind, place, error) from None


def _refusal(kind: type[BaseModel], place: str, error: ValidationError) -> Refusal:
    """The first thing that pydantic found wrong, as a sentence; a field that is not known before anything else."""
    found = error.errors(include_url=False, include_context=False)
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    name = place + ".".join(map(str, first["loc"]))[:200]
    if first["type"] == "missing":
        return wrong(name, "is missing → send it", "missing_required_parameter")
    if first["type"] == "extra_forbidden":
        known = (kind if len(first["loc"]) == 1 else StreamOptions).model_fields
        close = difflib.get_close_matches(str(first["loc"][-1])[:60], known, n=1, cutoff=0.4)
        return wrong(name, f"is not known → {f'did you mean {close[0]}?' if close else 'leave it out'}", "unknown_parameter")
    said = first["msg"].removeprefix("Input ")
    given = first["input"]
    shown = f"= {given} " if isinstance(given, int | float) and len(str(given)) < 30 else ""
    return wrong(name, f"{shown}does not work: it {said} → send such a value")
