"""How much of everything a client may ask for: the server's bounds, each an option of `serve`. Imports nothing heavy."""

from dataclasses import dataclass, field, fields
from typing import Any

from parallel.errors import Mistake
from research.generation.settings import MOST_LOGPROBS


def _bound(default: int | float, what: str) -> Any:
    return field(default=default, metadata={"what": what})


@dataclass(frozen=True)
class Limits:
    """All are inclusive and positive. What is over one is refused with its field's name, or cut off where there is nobody to tell."""

    queue: int = _bound(64, "texts that may wait for a slot; more are refused with 429")
    n: int = _bound(16, "texts for one prompt")
    prompts: int = _bound(64, "prompts of one request")
    messages: int = _bound(256, "messages of one conversation")
    stops: int = _bound(16, "stop strings")
    stop_length: int = _bound(256, "characters of a stop string")
    logprobs: int = _bound(20, "likeliest tokens beside each one written")
    body_bytes: int = _bound(2**20, "bytes of a request's body")
    depth: int = _bound(16, "brackets of a request's JSON inside of each other")
    connections: int = _bound(256, "connections at once")
    head_bytes: int = _bound(2**14, "bytes of a request's line and headers")
    head_seconds: float = _bound(10.0, "seconds until a new connection has sent them")
    body_seconds: float = _bound(10.0, "seconds until the body is there")
    idle_seconds: float = _bound(30.0, "seconds that a connection may stay open between two requests")
    stall_seconds: float = _bound(30.0, "seconds that a client may leave what was sent to it unread")
    request_seconds: float = _bound(600.0, "seconds for a whole request, waiting included")
    template_seconds: float = _bound(2.0, "seconds for the chat template to lay out a conversation")
    grace_seconds: float = _bound(5.0, "seconds that texts have to come to their end when the server is stopped")

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not 0 < value < 2**40:
                raise Mistake(f"--{each.name} {value} does not work → use more than 0, {each.default} is usual")
        if self.logprobs > MOST_LOGPROBS:
            raise Mistake(f"--logprobs {self.logprobs} does not work → use {MOST_LOGPROBS} or less")
