"""A client's HTTP connection: uvicorn's, over h11, with timeouts and limits that these do not have, and with errors in OpenAI's format.

uvicorn waits without limit for the headers of a new connection, for the rest of a body that nobody reads any more, and for a client that
does not read. h11 accepts requests that another server may read differently, and takes quadratic time for some malformed lines.
"""

import asyncio
import re
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from research.serving.errors import ApiError
from research.serving.limits import Limits
from research.serving.responses import to_json

LINGER_SECONDS = 1.0
"""How long a client may go on sending the body of a request that has been answered, so that it gets to read the answer."""
RECEIVED_BYTES = 2**14
"""Read from a connection at once. The other connections have their turn after it, however much a client sends."""
PARSED_BYTES = 2**10
"""Given to h11 at once, and the most of a line between the chunks of a body. h11 checks the length of incomplete lines only."""
MOST_BLANKS = 255
"""Spaces and tabs in a row in the headers. h11's pattern of a header takes time in proportion to the square of them."""
END_OF_HEAD = re.compile(rb"\n\r?\n")
TOO_MANY_CONNECTIONS = ApiError(503, "the server has as many connections as it takes → come back later", code="too_many_connections")


class RequestParser(h11.Connection):
    """h11's parser, which also rejects what is slow to parse, and requests whose length proxies and servers do not agree on."""

    def __init__(self, head_bytes: int) -> None:
        super().__init__(h11.SERVER, head_bytes)
        self.head_bytes = head_bytes
        self._checked = 0
        """How many bytes of the next request's head have been checked."""
        self.problem = ""
        """Why a request was rejected, if this class rejected it."""

    def next_event(self) -> Any:
        """h11's next event. Raises RemoteProtocolError for what is rejected."""
        if self.their_state is h11.IDLE:
            self._check_head(self.trailing_data[0])
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._checked = 0
            self._check_framing(event)
        if event is h11.NEED_DATA and self.their_state is h11.SEND_BODY and len(self.trailing_data[0]) > PARSED_BYTES:
            self._reject(f"a line between two chunks of the body has more than {PARSED_BYTES} bytes")
        return event

    def _check_head(self, received: bytes) -> None:
        start = max(0, self._checked - MOST_BLANKS)
        found = END_OF_HEAD.search(received, start)
        end = found.start() if found else len(received)
        if end > self.head_bytes:
            self._reject(f"the request line and the headers have more than {self.head_bytes} bytes")
        if b" " * (MOST_BLANKS + 1) in received[start:end].replace(b"\t", b" "):
            self._reject(f"the headers have more than {MOST_BLANKS} blanks in a row")
        self._checked = end

    def _check_framing(self, request: h11.Request) -> None:
        """Rejects a request whose end is in doubt: what one server takes for its body is another request to the next (smuggling)."""
        names = {name for name, _ in request.headers}
        if b"transfer-encoding" in names and b"content-length" in names:
            self._reject("the request has both Transfer-Encoding and Content-Length")
        if b"transfer-encoding" in names and request.http_version < b"1.1":
            self._reject("the request is of HTTP/1.0 and has Transfer-Encoding")

    def _reject(self, problem: str) -> None:
        self.problem = problem
        raise h11.RemoteProtocolError(problem)


class Connection(H11Protocol, asyncio.BufferedProtocol):
    """A client's connection with timeouts: for the next request's headers, and for a client that does not read its response."""

    conn: RequestParser

    def __init__(self, limits: Limits, **uvicorn_arguments: Any) -> None:
        super().__init__(**uvicorn_arguments)
        self.limits = limits
        self.conn = RequestParser(limits.head_bytes)
        self._received = bytearray(RECEIVED_BYTES)
        self._request_timer: asyncio.TimerHandle | None = None
        """Runs while no request is being handled."""
        self._stall_timer: asyncio.TimerHandle | None = None
        """Runs while the client does not read what was sent."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts to wait for a request, or rejects the connection if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._reject(TOO_MANY_CONNECTIONS)
        else:
            self._start_request_timer(self.limits.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels both timers."""
        for timer in (self._request_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def get_buffer(self, sizehint: int) -> bytearray:
        """Where asyncio puts what it receives next."""
        return self._received

    def buffer_updated(self, nbytes: int) -> None:
        """Parses what has been received, piece by piece, so that no line of many kilobytes is complete before its length is checked."""
        for start in range(0, nbytes, PARSED_BYTES):
            if not self.transport.is_closing():
                self.data_received(bytes(self._received[start : min(start + PARSED_BYTES, nbytes)]))

    def handle_events(self) -> None:
        """Cancels the timer once a request's headers are complete: from there on, the app has its own timeouts."""
        super().handle_events()
        if self._request_timer is not None and self.cycle is not None and not self.cycle.response_complete:
            self._request_timer.cancel()
            self._request_timer = None

    def on_response_complete(self) -> None:
        """Starts to wait for the next request; only briefly if the client is still sending the body of the last one."""
        unread = self.conn.their_state is h11.SEND_BODY
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._start_request_timer(LINGER_SECONDS if unread else self.limits.idle_seconds)

    def pause_writing(self) -> None:
        """Starts the timer for a client that does not read: asyncio calls this when the send buffer is full."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.limits.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Cancels the timer for a client that does not read."""
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """Rejects what is not HTTP, and headers that are too long."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            way_out = f"send HTTP/1.1 with less than {self.limits.head_bytes} bytes of headers"
            self._reject(ApiError(400, f"{self.conn.problem or msg} → {way_out}", code="invalid_http"))
        else:
            self.transport.close()  # a response has begun, so no error can be sent

    def _start_request_timer(self, seconds: float) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
        self._request_timer = self.loop.call_later(seconds, self.transport.abort)

    def _reject(self, error: ApiError) -> None:
        body = to_json(error.body())
        headers = ["content-type: application/json", f"content-length: {len(body)}", "connection: close"]
        head = "\r\n".join([f"HTTP/1.1 {error.status} Refused", *headers, "", ""])
        self.transport.write(head.encode() + body)
        self.transport.close()
