"""A request's answer as it goes out: one JSON object when all is written, or an event for every step (server-sent events)."""
# MERGED-DOC """A token by itself, as text and as bytes: a token may be half a character."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from research.data.tokenizer import Tokenizer
from research.generation.batching import LENGTH
from research.serving.engine import Job, Token
from research.serving.errors import ApiError
from research.serving.request_queue import PendingRequest, RequestQueue
from research.serving.requests import Common
from research.serving.service import Service

DONE = b"data: [DONE]\n\n"


class Shape(Protocol):
    """What differs between the endpoints: Completions, Chats."""

    object: str
    chunk_object: str
    prefix: str
    asked: Any
    service: Service
    jobs: list[Job]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of what was asked."""

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What a stream begins with."""

    def choice(self, index: int, text: str, tokens: tuple[Token, ...], finish: str | None) -> dict[str, Any]:
        """A part of a text."""

    def whole(self, index: int, text: str, tokens: tuple[Token, ...], finish: str) -> dict[str, Any]:
        """A text, whole."""


@dataclass
class RequestLog:
    """What the log tells of a request. No text of anybody's."""

    prompt: int = 0
    written: int = 0
    finish: str = ""


@dataclass
class CompletionResponse:
    """One call's answer."""

    shape: Shape
    call: PendingRequest
    note: RequestLog
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    counts: dict[int, int] = field(default_factory=dict)
    """Tokens written so far of each text."""

    @property
    def desk(self) -> RequestQueue:
        """Where the pieces come from."""
        return self.shape.service.desk

    @property
    def asked(self) -> Common:
        """The request."""
        return self.shape.asked

    async def whole(self) -> dict[str, Any]:
        """Everything, when all is written."""
        texts = [_Collected() for _ in self.call.jobs]
        async for index, piece in self.desk.pieces(self.call):
            self._count(index, piece.count, piece.finish)
            texts[index].add(piece.text, piece.tokens, piece.finish)
        choices = [self.shape.whole(i, "".join(text.parts), tuple(text.tokens), text.finish) for i, text in enumerate(texts)]
        return self._frame(self.shape.object) | {"choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """An event a step and text; the last says that it is over, and the one before it, where something failed, what."""
        for index in range(len(self.call.jobs)):
            for choice in self.shape.opening(index):
                yield self._event([choice])
        try:
            async for index, piece in self.desk.pieces(self.call):
                self._count(index, piece.count, piece.finish)
                if piece.text or piece.tokens or piece.finish:
                    yield self._event([self.shape.choice(index, piece.text, piece.tokens, reason(piece.finish))])
        except ApiError as refusal:
            yield event(refusal.body())
        else:
            if self._tells_usage:
                yield event(self._frame(self.shape.chunk_object) | {"choices": [], "usage": self._usage()})
        yield DONE

    @property
    def _tells_usage(self) -> bool:
        return bool(self.asked.stream_options and self.asked.stream_options.include_usage)

    def _event(self, choices: list[dict[str, Any]]) -> bytes:
        usage = {"usage": None} if self._tells_usage else {}
        return event(self._frame(self.shape.chunk_object) | {"choices": choices} | usage)

    def _frame(self, kind: str) -> dict[str, Any]:
        service = self.shape.service
        told = {"id": f"{self.shape.prefix}-{self.id}", "object": kind, "created": self.created, "model": service.name}
        return told | {"system_fingerprint": service.fingerprint}

    def _count(self, index: int, count: int, finish: str | None) -> None:
        self.counts[index] = count
        self.note.written = sum(self.counts.values())
        self.note.finish = reason(finish) or self.note.finish

    def _usage(self) -> dict[str, int]:
        prompt, written = self.shape.prompt_tokens, sum(self.counts.values())
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


class _Collected:
    """A text's pieces, put together."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.tokens: list[Token] = []
        self.finish = ""

    def add(self, text: str, tokens: tuple[Token, ...], finish: str | None) -> None:
        """One more."""
        self.parts.append(text)
        self.tokens += tokens
        self.finish = reason(finish) or self.finish


def reason(finish: str | None) -> str | None:
    """Our word for a text's end, in OpenAI's: by itself or before a stop string is `stop`."""
    return finish and ("length" if finish == LENGTH else "stop")


def event(value: dict[str, Any]) -> bytes:
    """As server-sent events are written."""
    return b"data: " + encoded(value) + b"\n\n"


def encoded(value: Any) -> bytes:
    """JSON on one line. Halves of characters, which a client's field names may hold, are escaped with everything beyond ASCII."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


UNFINISHED = "\N{REPLACEMENT CHARACTER}"
SPACE = "▁"


def token_bytes(tokenizer: Tokenizer, token: int) -> list[int] | None:
    """The bytes it stands for; None where it cannot be said."""
    name = tokenizer.backend.id_to_token(token)
    if name is None:
        return None
    letters = _byte_letters()
    if _is_byte_level(tokenizer.backend) and all(letter in letters for letter in name):
        return [letters[letter] for letter in name]
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):  # sentencepiece's way
        return [int(name[3:5], 16)]
    text = tokenizer.decode([token])
    return None if UNFINISHED in text else list(text.encode())


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The token as a client shows it: with the space that a tokenizer drops at the beginning of a text."""
    text, name = tokenizer.decode([token]), tokenizer.backend.id_to_token(token) or ""
    return f" {text}" if name.startswith(SPACE) and not text.startswith(" ") else text


def _is_byte_level(backend: Any) -> bool:
    return type(backend.decoder).__name__ == "ByteLevel"


def _byte_letters() -> dict[str, int]:
    """GPT-2's table: a visible letter for each byte. Visible ones stand for themselves, the others follow from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}
