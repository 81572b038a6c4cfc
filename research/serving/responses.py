"""Responses of the completion endpoints: one JSON object when all texts are finished, or server-sent events, one per step and text."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from parallel.errors import Mistake
from research.data.tokenizer import Tokenizer
from research.generation.batching import LENGTH
from research.serving.engine import Job, Token
from research.serving.errors import ApiError
from research.serving.request_queue import PendingRequest
from research.serving.service import Service

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
SPACE = "▁"
"""Sentencepiece's character for a space."""
VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTE_OF = {chr(byte): byte for byte in VISIBLE} | {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*VISIBLE}))}
"""Byte-level BPE: GPT-2's table of a visible character per byte. Visible bytes stand for themselves, the others follow from 256 on."""


class Endpoint(Protocol):
    """A checked request to one of the endpoints, and the parts of a response in which they differ: see endpoints.py."""

    object: str
    chunk_object: str
    id_prefix: str
    request: Any
    service: Service
    jobs: list[Job]
    prompt_tokens: int
    left_out: dict[str, int]
    """How much of the prompt is left out, in a field of the response; empty if the request does not allow it."""

    def opening(self, index: int) -> list[dict[str, Any]]:
        """The choices that a stream begins with."""

    def chunk(self, index: int, text: str, tokens: tuple[Token, ...], finish: str | None) -> dict[str, Any]:
        """The choice of a stream's event: what one step added to text `index`."""

    def whole(self, index: int, text: str, tokens: tuple[Token, ...], finish: str) -> dict[str, Any]:
        """The choice of a response that is not streamed: text `index` as a whole."""


@dataclass
class RequestLog:
    """What the log says about a request: token counts and the finish reason, never a client's text."""

    prompt: int = 0
    written: int = 0
    finish: str = ""


@dataclass
class CompletionResponse:
    """The response to one request, as one object (`whole`) or as events (`events`)."""

    endpoint: Endpoint
    pending: PendingRequest
    log: RequestLog
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    counts: dict[int, int] = field(default_factory=dict)
    """Number of tokens generated so far, by text."""

    async def whole(self) -> bytes:
        """Returns the response object, as JSON, once all texts are finished.

        With log-probabilities it has up to half a kilobyte for each token and each text, so a thread writes it.
        """
        texts: list[list[str]] = [[] for _ in self.pending.jobs]
        tokens: list[list[Token]] = [[] for _ in self.pending.jobs]
        finish = [""] * len(self.pending.jobs)
        async for index, piece in self.endpoint.service.request_queue.pieces(self.pending):
            self._count(index, piece.count, piece.finish)
            texts[index].append(piece.text)
            tokens[index] += piece.tokens
            finish[index] = finish_reason(piece.finish) or finish[index]

        def write() -> bytes:
            # one choice after the other, because json.dumps lets no other thread run
            choices = [to_json(self.endpoint.whole(i, "".join(text), tuple(tokens[i]), finish[i])) for i, text in enumerate(texts)]
            rest = to_json(self._envelope(self.endpoint.object) | {"usage": self._usage()})
            return b'%b,"choices":[%b]}' % (rest.removesuffix(b"}"), b",".join(choices))

        return await self.endpoint.service.intake.run(write)

    async def events(self) -> AsyncIterator[bytes]:
        """Yields one event per step and text, then the usage if it was requested, then [DONE].

        If the request fails after the stream has begun, the event before [DONE] holds the error.
        """
        endpoint, options = self.endpoint, self.endpoint.request.stream_options
        include_usage = bool(options and options.include_usage)
        envelope = self._envelope(endpoint.chunk_object)

        def chunk(choice: dict[str, Any]) -> bytes:
            return sse_event(envelope | {"choices": [choice]} | ({"usage": None} if include_usage else {}))

        for index in range(len(self.pending.jobs)):
            for choice in endpoint.opening(index):
                yield chunk(choice)
        try:
            async for index, piece in endpoint.service.request_queue.pieces(self.pending):
                self._count(index, piece.count, piece.finish)
                if piece.text or piece.tokens or piece.finish:
                    yield chunk(endpoint.chunk(index, piece.text, piece.tokens, finish_reason(piece.finish)))
        except ApiError as error:
            yield sse_event(error.body())
        except Mistake as mistake:  # the tokenizer cannot decode what was generated
            yield sse_event(ApiError(500, str(mistake), code="failed").body())
        else:
            if include_usage:
                yield sse_event(envelope | {"choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _envelope(self, object_name: str) -> dict[str, Any]:
        service = self.endpoint.service
        return {
            "id": f"{self.endpoint.id_prefix}-{self.id}",
            "object": object_name,
            "created": self.created,
            "model": service.name,
            "system_fingerprint": service.fingerprint,
            **self.endpoint.left_out,
        }

    def _count(self, index: int, count: int, finish: str | None) -> None:
        self.counts[index] = count
        self.log.written = sum(self.counts.values())
        self.log.finish = finish_reason(finish) or self.log.finish

    def _usage(self) -> dict[str, int]:
        prompt, written = self.endpoint.prompt_tokens, sum(self.counts.values())
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def finish_reason(finish: str | None) -> str | None:
    """OpenAI's name for our finish reason: `stop` for an end token or a stop string, `length` for the limit of tokens."""
    return finish and ("length" if finish == LENGTH else "stop")


def sse_event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def to_json(value: Any) -> bytes:
    """JSON on one line, in ASCII: a lone surrogate, which may be in a client's field name, could not be encoded as UTF-8."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token by itself, with the leading space that a tokenizer drops at the beginning of a text."""
    text, name = tokenizer.decode([token]), tokenizer.backend.id_to_token(token) or ""
    return f" {text}" if name.startswith(SPACE) and not text.startswith(" ") else text


def token_bytes(tokenizer: Tokenizer, token: int) -> list[int] | None:
    """The bytes of a token, which may be part of a character; None if they are not known."""
    name = tokenizer.backend.id_to_token(token)
    if name is None:
        return None

    if type(tokenizer.backend.decoder).__name__ == "ByteLevel" and all(letter in BYTE_OF for letter in name):
        return [BYTE_OF[letter] for letter in name]

    # sentencepiece writes a single byte as <0x0A>
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return [int(name[3:5], 16)]
    text = tokenizer.decode([token])
    return None if UNFINISHED in text else list(text.encode())
