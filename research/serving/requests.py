"""Request bodies: reads the body within limits of size and time, parses it as strict JSON, and validates every field (pydantic).

Parsing takes time in proportion to the body's bytes, whatever they are: a body that took longer would hold up all other requests.

A field that is not known is rejected by name. OpenAI's clients send null for a field that is not set, so null counts as absent. A
field that OpenAI has and this server does not support is rejected unless its value asks for nothing; fields that only label a
request are accepted and dropped.
"""

import asyncio
import functools
import itertools
import json
import math
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from parallel.errors import listed, nearest
from research.serving.errors import ApiError, check_unicode, invalid_field
from research.serving.limits import Limits

JSON = "application/json"
NESTING = {ord("{"): 1, ord("["): 1, ord("}"): -1, ord("]"): -1}
OTHER_BYTES = bytes(byte for byte in range(256) if byte not in NESTING)
MOST_BRACKETS = 2**14
"""In one body. A conversation of 256 messages with ten parts each has 6,000."""
MOST_DIGITS, MOST_FLOAT_CHARACTERS = 20, 64
"""Of an integer: a 64-bit one has at most 19, and a sign. Of any other number: a double that is written exactly enough has at most 24."""
MOST_FIELDS = 512
"""Of one object."""
LABELS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
"""Fields that change nothing about the text."""
UNSUPPORTED: dict[str, tuple[Any, ...]] = {"logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,)}
"""Fields that no endpoint supports -> the values that ask for nothing."""
UNSUPPORTED_IN_MESSAGES = ("tool_calls", "function_call", "tool_call_id", "audio", "refusal", "annotations")
ALTERNATIVES = dict.fromkeys(("presence_penalty", "frequency_penalty"), "repetition_penalty") | {"best_of": "n"}
SMALLEST_TEMPERATURE = 1e-3
"""A smaller temperature, other than 0, would only overflow."""
LONGEST_SHOWN = 40
"""Characters of a wrong value that an error repeats."""
TYPES = {"string": "a string", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
"""What an error calls the types of a JSON schema."""
BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "maxLength": "at most {} characters",
}

Model = TypeVar("Model", bound=BaseModel)


async def read_body(headers: Mapping[str, str], chunks: AsyncIterator[bytes], limits: Limits) -> bytes:
    """Reads a request's body, which `parse_json` parses.

    Raises an ApiError for a wrong type (415), too many bytes whatever Content-Length says (413), and too much time (408).
    """
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != JSON:  # a page of another site cannot send this type without a CORS preflight, which is not answered
        raise ApiError(415, f"the body's content-type is {content_type[:60]!r} → send {JSON}", code="unsupported_media_type")
    body, most = bytearray(), limits.body_bytes
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in chunks:
                body += chunk
                if len(body) > most:
                    message = f"the body has more than {most} bytes → send less, or start the server with --body_bytes"
                    raise ApiError(413, message, code="too_large")
    except TimeoutError:
        raise ApiError(408, f"the body took more than {limits.body_seconds:g} s → send it at once", code="timeout") from None
    return bytes(body)


def parse_json(body: bytes, depth: int) -> dict[str, Any]:
    """Parses a JSON object in UTF-8: without duplicate keys, NaN, or numbers that do not fit, and at most `depth` brackets deep."""
    brackets = _brackets(body)
    if len(brackets) > MOST_BRACKETS:
        raise _not_json(f"has {len(brackets)} brackets, more than {MOST_BRACKETS}", "too_many")
    if max(itertools.accumulate(map(NESTING.__getitem__, brackets)), default=0) > depth:
        raise _not_json(f"is more than {depth} brackets deep", "too_deep")
    try:
        value = json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int)
    except UnicodeDecodeError as error:
        raise _not_json(f"is not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise _not_json(f"is not JSON ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise _not_json("is JSON, but no object")
    return value


def _brackets(body: bytes) -> bytes:
    """The brackets outside of strings. Each line reads the body once, whatever it holds: a regular expression could be made to restart.

    The parser rejects what is not JSON, such as a string without an end, which here ends with the body.
    """
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b"".join(unescaped.split(b'"')[::2]).translate(None, OTHER_BYTES)


def _not_json(problem: str, code: str = "invalid_json") -> ApiError:
    return ApiError(400, f'the body {problem} → send a JSON object such as {{"prompt": "…"}}', code=code)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) > MOST_FIELDS:
        raise _not_json(f"has an object with more than {MOST_FIELDS} fields")
    if len(table) < len(pairs):
        seen: set[str] = set()
        duplicate = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ApiError(400, f"{duplicate[:100]} is there twice → send it once", duplicate[:100], "invalid_json")
    return table


def _constant(name: str) -> float:
    raise _not_json(f"contains {name}, which is no number of JSON")


def _float(text: str) -> float:
    if len(text) > MOST_FLOAT_CHARACTERS:
        raise _not_json(f"contains {text[:MOST_DIGITS]}…, a number of {len(text)} characters, more than {MOST_FLOAT_CHARACTERS}")
    number = float(text)
    if not math.isfinite(number):
        raise _not_json(f"contains {text[:40]}, which is too large")
    return number


def _int(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise _not_json(f"contains {text[:MOST_DIGITS]}…, a number of {len(text)} digits")
    return int(text)


def _one_or_several(value: Any, handler: ValidatorFunctionWrapHandler) -> list[str]:
    """`stop` is a string or a list of strings."""
    return handler([value] if isinstance(value, str) else value)


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted without effect: no padding is added to the events."""


class CommonFields(BaseModel):
    """The fields of both endpoints. Types are strict: neither a string nor a boolean is accepted for a number."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = UNSUPPORTED
    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    """The default is OpenAI's, not `generate`'s. 1 samples from the model's own distribution, 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.1, le=10)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: int = Field(1, ge=1)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], FailFast(), WrapValidator(_one_or_several)] = Field(
        [], description="a string that is not empty, or a list of such strings"
    )
    stream: bool = False
    stream_options: StreamOptions | None = Field(None, description='an object such as {"include_usage": true}')
    truncation: Literal["disabled", "auto"] = "disabled"
    """What to do with a prompt that is longer than the context: reject it, or leave out its beginning (truncation.py)."""

    @model_validator(mode="after")
    def _check_common(self) -> Self:
        if 0 < self.temperature < SMALLEST_TEMPERATURE:
            raise invalid_field("temperature", f"= {self.temperature} is between 0 and {SMALLEST_TEMPERATURE} → use 0, which is greedy")
        if self.stream_options and not self.stream:
            raise invalid_field("stream_options", "goes with stream = true only → leave it out")
        return self


class CompletionRequest(CommonFields):
    """The body of /v1/completions."""

    unsupported = UNSUPPORTED | {"best_of": (1,)}
    prompt: Any = "\n"
    """Text, token ids, or a list of either, which CompletionEndpoint checks."""
    suffix: str = ""
    """What follows the text, for a model that was trained to fill in a middle."""
    logprobs: int | None = Field(None, ge=0)
    echo: bool = False

    @model_validator(mode="after")
    def _check_echo(self) -> Self:
        if self.echo and self.logprobs is not None:
            message = "with logprobs asks for the prompt's, which are not computed → leave one of them out"
            raise invalid_field("echo", message, "unsupported")
        for name, used in (("echo", self.echo), ("truncation", self.truncation == "auto")):
            if self.suffix and used:
                raise invalid_field(name, "does not go with a suffix → leave one of them out", "unsupported")
        return self


class ChatRequest(CommonFields):
    """The body of /v1/chat/completions."""

    unsupported = UNSUPPORTED | {
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
    messages: list[Any] = Field(min_length=1, description='a list such as [{"role": "user", "content": "…"}]')
    """Each is checked by `validate_message`."""
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise invalid_field("max_tokens", "and max_completion_tokens differ → send the second alone")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid_field("top_logprobs", "goes with logprobs = true only → send both")
        return self


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Any = Field(description='a string, or a list of {"type": "text", "text": "…"}')
    name: str | None = Field(None, max_length=256)


Request = TypeVar("Request", bound=CommonFields)


def validate(schema: type[Request], body: dict[str, Any]) -> Request:
    """Validates the body of a request. Raises an ApiError about the first field that is wrong."""
    fields = {name: value for name, value in body.items() if value is not None and name not in LABELS}
    for name, neutral in schema.unsupported.items():
        if name in fields and not any(type(fields[name]) in (type(value), float) and fields[name] == value for value in neutral):
            alternative = f"use {ALTERNATIVES[name]} instead" if name in ALTERNATIVES else "leave it out"
            raise invalid_field(name, f"is not supported → {alternative}", "unsupported_parameter")
        fields.pop(name, None)
    return _validate_fields(schema, fields)


def validate_message(message: Any, place: str) -> ChatMessage:
    """Validates one message. Raises an ApiError about the first field that is wrong, whose name begins with `place`."""
    if not isinstance(message, dict):
        raise invalid_field(place, 'is no object → send {"role": "user", "content": "…"}')
    for name in UNSUPPORTED_IN_MESSAGES:
        if message.get(name) not in (None, []):
            raise invalid_field(f"{place}.{name}", "is not supported → send text only", "unsupported_parameter")
    fields = {name: value for name, value in message.items() if value is not None and name not in UNSUPPORTED_IN_MESSAGES}
    return _validate_fields(ChatMessage, fields, f"{place}.")


def _validate_fields(schema: type[Model], fields: dict[str, Any], prefix: str = "") -> Model:
    """Validates with pydantic; its first error becomes a sentence. An unknown field is reported before any other error."""
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    path = [part for part in first["loc"] if isinstance(part, str)]  # the field as a whole, not the entry of a list
    name = prefix + ".".join(path)[:200]
    if first["type"] == "extra_forbidden":
        known = (schema if len(path) == 1 else StreamOptions).model_fields
        near = nearest(path[-1][:60], known)
        raise invalid_field(name, f"is not known → {f'did you mean {near}?' if near else 'leave it out'}", "unknown_parameter")
    if first["type"] == "string_unicode":
        check_unicode(first["input"], name)
    needed = f"send {needs(schema, path)}"
    if first["type"] == "missing":
        raise invalid_field(name, f"is missing → {needed}", "missing_required_parameter")
    value = json.dumps(functools.reduce(dict.__getitem__, path, fields))
    shown = f"= {value} " if len(value) <= LONGEST_SHOWN else ""
    raise invalid_field(name, f"{shown}does not work → {needed}")


def needs(schema: type[BaseModel], path: list[str]) -> str:
    """What the field at `path` accepts, in words: 'a whole number of at least 1'."""
    owner = schema if len(path) == 1 else StreamOptions
    return _words(owner.model_json_schema()["properties"][path[-1]])


def _words(field: dict[str, Any]) -> str:
    """The words for a field's JSON schema: its description, or else its type and bounds."""
    if "description" in field:
        return field["description"]
    if "enum" in field:
        return listed(map(json.dumps, field["enum"]))
    if "anyOf" in field:
        return listed(_words(each) for each in field["anyOf"] if each != {"type": "null"})
    bounds = listed((words.format(field[key]) for key, words in BOUNDS.items() if key in field), "and")
    return TYPES[field["type"]] + (f" of {bounds}" if bounds else "")
