"""What a request may contain: every field checked by type and by bounds, every other one refused by its name.

OpenAI's clients send null for what is not set, so null is absence. What OpenAI has and this server has not is refused unless it
is set to what the server does anyway; what only labels a request is accepted and dropped.
"""
# MERGED-DOC """A request's body, counted and timed while it comes, as a table of strict JSON."""

import asyncio
import difflib
import json
import math
import re
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from research.serving.errors import ApiError, wrong
from research.serving.limits import Limits

JSON = "application/json"
BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)
"""Strings are matched so that brackets in them are not counted; one that does not end matches nothing, and the parser refuses it."""
DIGITS = 20
"""Of a whole number: 64 bits have 19 at most, and a sign."""
FIELDS = 512
"""Of one object."""


async def read(headers: Mapping[str, str], chunks: AsyncIterator[bytes], limits: Limits) -> dict[str, Any]:
    """The table. Refused by type (415), size (413, whatever Content-Length says), time (408), and where it is not JSON (400)."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:  # a page of another site cannot send this type without asking first, and it is not answered
        raise ApiError(415, f"the body's content-type is {kind[:60]!r} → send {JSON}", code="unsupported_media_type")
    try:
        async with asyncio.timeout(limits.body_seconds):
            raw = await _collected(chunks, limits.body_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body took more than {limits.body_seconds:g} s → send it at once", code="timeout") from None
    return await asyncio.to_thread(parse, raw, limits.depth)


async def _collected(chunks: AsyncIterator[bytes], most: int) -> bytes:
    found = bytearray()
    async for chunk in chunks:
        found += chunk
        if len(found) > most:
            raise ApiError(413, f"the body has more than {most} bytes → send less, or start the server with --body_bytes", code="too_large")
    return bytes(found)


def parse(raw: bytes, depth: int) -> dict[str, Any]:
    """A JSON object in UTF-8: no key twice, no NaN, no number that a computer cannot hold, not too deep."""
    if _depth(raw, depth) > depth:
        raise _not_json(f"is more than {depth} brackets deep", "too_deep")
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_table, parse_constant=_constant, parse_float=_float, parse_int=_int)
    except UnicodeDecodeError as error:
        raise _not_json(f"is not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise _not_json(f"is not JSON ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise _not_json("is JSON, but no object")
    return value


def _not_json(what: str, code: str = "invalid_json") -> ApiError:
    return ApiError(400, f'the body {what} → send a JSON object such as {{"prompt": "…"}}', code=code)


def _depth(raw: bytes, enough: int) -> int:
    """How deep brackets are inside of each other; stops counting once it is more than `enough`."""
    depth = most = 0
    for match in BRACKETS.finditer(raw):
        first = match[0][:1]
        depth += 1 if first in b"[{" else -1 if first in b"]}" else 0
        if (most := max(most, depth)) > enough:
            break
    return most


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) > FIELDS:
        raise _not_json(f"has an object with more than {FIELDS} fields")
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ApiError(400, f"{twice[:100]} is there twice → send it once", twice[:100], "invalid_json")
    return found


def _constant(name: str) -> float:
    raise _not_json(f"contains {name}, which is no number of JSON")


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _not_json(f"contains {text[:40]}, which is too large")
    return number


def _int(text: str) -> int:
    if len(text) > DIGITS:
        raise _not_json(f"contains {text[:DIGITS]}…, a number of {len(text)} digits")
    return int(text)


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
    """Text, ids, or a list of either: research/serving/endpoints.py."""
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
        raise _api_error(kind, place, error) from None


def _api_error(kind: type[BaseModel], place: str, error: ValidationError) -> ApiError:
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
