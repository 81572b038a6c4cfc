"""What every request passes: who may ask, and a line in the log about how it went. It shows nobody's text."""

import datetime
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from research.serving.access import Access
from research.serving.answers import Note
from research.serving.app import refused
from research.serving.metrics import Metrics
from research.serving.refusal import Refusal

OPEN = ("/", "/page.css", "/page.js", "/health")
"""What needs no token: the page, which asks for it, and whether the server lives."""
KNOWN = (*OPEN, "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
QUIET = ("/health", "/metrics")
"""Asked every few seconds by machines: not in the log."""
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Door:
    """An ASGI app around another."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics, say: Callable[[str], None]) -> None:
        self.app, self.access, self.metrics, self.say = app, access, metrics, say

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        begun, note, status = time.monotonic(), Note(), 500
        path = scope["path"] if scope["path"] in KNOWN else "other"

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        try:
            await self._admitted(scope)({**scope, "note": note}, receive, noted)
        finally:
            seconds = time.monotonic() - begun
            self.metrics.request(path, status, seconds)
            if path not in QUIET or status >= 400:
                self.say(line(scope["method"], path, status, seconds, note))

    def _admitted(self, scope: Scope) -> ASGIApp:
        """The app, or a refusal."""
        if self.access.token is not None and scope["path"] in OPEN:
            return self.app
        try:
            self.access.check(Headers(scope=scope))
        except Refusal as refusal:
            return refused(refusal)
        return self.app


def line(method: str, path: str, status: int, seconds: float, note: Note) -> str:
    """`12:00:01  POST /v1/completions  200  7 + 16 tokens  0.31 s  length`."""
    now = datetime.datetime.now().strftime("%H:%M:%S")
    method = method if method.isalpha() else "?"
    tokens = f"  {note.prompt} + {note.written} tokens" if note.prompt else ""
    return f"{now}  {method[:10]} {path}  {status}{tokens}  {seconds:.2f} s" + (f"  {note.finish}" if note.finish else "")
