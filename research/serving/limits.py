"""The server's limits: on request sizes, counts and times, and on the request queue. Each is an option of `serve`.

This module imports neither torch nor FastAPI, so that `serve --help` is fast.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from parallel.errors import Mistake
from research.generation.settings import MOST_LOGPROBS


def _limit(default: int | float, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class Limits:
    """All limits are inclusive and positive.

    A request over a limit is rejected with the name of its field; a connection that sends no complete request is closed.
    """

    queue: int = _limit(64, "texts that may wait for a slot; more are refused with 429")
    n: int = _limit(16, "texts for one prompt")
    prompts: int = _limit(64, "prompts of one request")
    messages: int = _limit(256, "messages of one conversation")
    characters: int = _limit(2**17, "characters of the prompts or messages of one request")
    stops: int = _limit(16, "stop strings")
    stop_length: int = _limit(256, "characters of a stop string")
    logprobs: int = _limit(20, "likeliest tokens beside each one written")
    body_bytes: int = _limit(2**20, "bytes of a request's body")
    depth: int = _limit(16, "brackets of a request's JSON inside of each other")
    connections: int = _limit(256, "connections at once")
    head_bytes: int = _limit(2**14, "bytes of a request's line and headers")
    head_seconds: float = _limit(10.0, "seconds until a new connection has sent them")
    body_seconds: float = _limit(10.0, "seconds until the body is there")
    idle_seconds: float = _limit(30.0, "seconds that a connection may stay open between two requests")
    stall_seconds: float = _limit(30.0, "seconds that a client may leave what was sent to it unread")
    request_seconds: float = _limit(600.0, "seconds for a whole request, waiting included")
    template_seconds: float = _limit(2.0, "seconds for the chat template to lay out a conversation")
    template_queue: int = _limit(16, "conversations that may wait for the chat template; more are refused with 429")
    grace_seconds: float = _limit(5.0, "seconds that texts have to come to their end when the server is stopped")

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not 0 < value < 2**40:
                raise Mistake(f"--{limit.name} {value} does not work → use more than 0, {limit.default} is usual")
        if self.logprobs > MOST_LOGPROBS:
            raise Mistake(f"--logprobs {self.logprobs} does not work → use {MOST_LOGPROBS} or less")
