"""uvicorn's connection, with a time for everything that a client may leave undone, and OpenAI's shape for what is no HTTP.

uvicorn itself waits for ever for the headers of a new connection, for the rest of a body that nobody reads any more, and for a
client that does not read.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from research.serving.answers import encoded
from research.serving.limits import Limits
from research.serving.refusal import Refusal

LINGER = 1.0
"""Seconds in which a client may go on sending what has been answered already, so that it gets to read the answer."""
FULL = Refusal(503, "the server has as many connections as it takes → come back later", code="too_many_connections")


class Connection(H11Protocol):
    """One client's. Its deadline runs while no request is under way, its patience while the client does not read."""

    def __init__(self, limits: Limits, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self.limits = limits
        self._deadline: asyncio.TimerHandle | None = None
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a request; too many connections are turned away."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(FULL)
        else:
            self._wait(self.limits.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        for timer in (self._deadline, self._patience):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """A request that has begun is the app's, which has times of its own."""
        super().handle_events()
        if self._deadline is not None and self.cycle is not None and not self.cycle.response_complete:
            self._deadline.cancel()
            self._deadline = None

    def on_response_complete(self) -> None:
        """Waits for the next request; not long where the last one is still being sent."""
        unread = self.conn.their_state is h11.SEND_BODY
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._wait(LINGER if unread else self.limits.idle_seconds)

    def pause_writing(self) -> None:
        """The client does not read what is sent."""
        super().pause_writing()
        self._patience = self.loop.call_later(self.limits.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        if self._patience is not None:
            self._patience.cancel()

    def send_400_response(self, msg: str) -> None:
        """What was sent is no HTTP, or its headers are too long."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            way = f"send HTTP/1.1 with less than {self.limits.head_bytes} bytes of headers"
            self._refuse(Refusal(400, f"{msg} → {way}", code="invalid_http"))
        else:
            self.transport.close()  # in the middle of an answer nothing can be said

    def _wait(self, seconds: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _refuse(self, refusal: Refusal) -> None:
        body = encoded(refusal.body())
        headers = ["content-type: application/json", f"content-length: {len(body)}", "connection: close"]
        head = "\r\n".join([f"HTTP/1.1 {refusal.status} Refused", *headers, "", ""])
        self.transport.write(head.encode() + body)
        self.transport.close()
