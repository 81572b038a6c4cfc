"""The server's addresses, and what each answers. FastAPI routes; bodies are read and checked by hand, within bounds."""
# MERGED-DOC """The chat page: three files of ours, and a policy that lets a browser load nothing else."""
# MERGED-DOC """What every request passes: who may ask, and a line in the log about how it went. It shows nobody's text."""

import asyncio
import datetime
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parallel.errors import Mistake
from research.serving import prometheus, requests
from research.serving.access import Access
from research.serving.endpoints import Chats, Completions
from research.serving.errors import ApiError, closing
from research.serving.prometheus import Metrics
from research.serving.responses import CompletionResponse, RequestLog, Shape, encoded
from research.serving.service import Service

FOLDER = Path(__file__).resolve().parent / "page"
FILES = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", "text/javascript")}
POLICY = "; ".join(
    [
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "connect")),
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)


def add(app: FastAPI) -> None:
    """Adds a route for each of the files, which are read now."""
    for address, (name, kind) in FILES.items():
        content = (FOLDER / name).read_bytes()
        headers = {"content-type": f"{kind}; charset=utf-8", "content-security-policy": POLICY, "cache-control": "no-cache"}
        app.add_api_route(address, _sender(content, headers), methods=["GET"], include_in_schema=False)


def _sender(content: bytes, headers: dict[str, str]):
    async def send() -> Response:
        return Response(content, headers=headers)

    return send


JSON = "application/json"
STREAM = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
Result = TypeVar("Result")
Parsed = Callable[[Service, dict[str, Any]], Shape]


class Gone(Exception):
    """The client has left."""


def application(service: Service) -> FastAPI:
    """The routes, of one server."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(Mistake, _mistaken)
    app.add_exception_handler(HTTPException, _not_routed)
    app.add_exception_handler(Exception, _broken)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await respond(service, request, lambda service, value: Completions(service, requests.completion(value)))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await respond(service, request, lambda service, value: Chats(service, requests.chat(value)))

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [service.card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.refuse_other(name)
        return _json(service.card())

    @app.get("/health")
    async def health() -> Response:
        if service.desk.closed:
            raise closing()
        return _json({"status": "ok"})

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(service.metrics.text(), headers={"content-type": prometheus.CONTENT_TYPE})

    add(app)
    return app


async def respond(service: Service, request: Request, understood: Parsed) -> Response:
    """Reads, checks and queues a request; the answer comes whole, or as events once it has been accepted."""
    value = await requests.read(request.headers, request.stream(), service.limits)
    shape = await asyncio.to_thread(understood, service, value)
    note: RequestLog = request.scope["note"]
    note.prompt = shape.prompt_tokens
    answer = CompletionResponse(shape, service.desk.open(shape.jobs), note)
    service.metrics.prompt(shape.prompt_tokens)
    if shape.asked.stream:
        return Events(answer)
    try:
        return _json(await unless_gone(request.receive, answer.whole()))
    except Gone:
        note.finish = "the client has left"
        return Response(status_code=499)  # nobody reads it; the log and the metrics do
    finally:
        service.desk.leave(answer.call)


class Events(Response):
    """A stream that ends with the client: its texts then leave their slots."""

    def __init__(self, answer: CompletionResponse) -> None:
        super().__init__(headers=STREAM)
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the head, and events as they come."""
        try:
            await unless_gone(receive, self._send(send))
        except Gone:
            self.answer.note.finish = "the client has left"
        finally:
            self.answer.desk.leave(self.answer.call)

    async def _send(self, send: Send) -> None:
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for event in self.answer.events():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The work's result; Gone, and the work is cancelled, once the client leaves. The request's body has been read."""
    doing, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise Gone
    finally:
        for task in (doing, watching):
            task.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encoded(value), status, {"content-type": JSON, **(headers or {})})


def error_response(refusal: ApiError) -> Response:
    """A refusal as it goes out."""
    return _json(refusal.body(), refusal.status, refusal.headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _mistaken(request: Request, error: Exception) -> Response:
    """What the library refuses and no field's check has seen before."""
    return error_response(ApiError(400, str(error), code="invalid_value"))


async def _not_routed(request: Request, error: Exception) -> Response:
    """An address that is not there, or not with this method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method[:20]} {request.url.path[:100]} is not here"
    ways = "GET /v1/models /health /metrics, POST /v1/completions /v1/chat/completions"
    return error_response(ApiError(error.status_code, f"{what} → {ways}", code="not_found", headers=error.headers))


async def _broken(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "the server has met an error, which its log shows", code="internal"))


OPEN = ("/", "/page.css", "/page.js", "/health")
"""What needs no token: the page, which asks for it, and whether the server lives."""
KNOWN = (*OPEN, "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
QUIET = ("/health", "/metrics")
"""Asked every few seconds by machines: not in the log."""
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Middleware:
    """An ASGI app around another."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics, say: Callable[[str], None]) -> None:
        self.app, self.access, self.metrics, self.say = app, access, metrics, say

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        begun, note, status = time.monotonic(), RequestLog(), 500
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
        except ApiError as refusal:
            return error_response(refusal)
        return self.app


def line(method: str, path: str, status: int, seconds: float, note: RequestLog) -> str:
    """`12:00:01  POST /v1/completions  200  7 + 16 tokens  0.31 s  length`."""
    now = datetime.datetime.now().strftime("%H:%M:%S")
    method = method if method.isalpha() else "?"
    tokens = f"  {note.prompt} + {note.written} tokens" if note.prompt else ""
    return f"{now}  {method[:10]} {path}  {status}{tokens}  {seconds:.2f} s" + (f"  {note.finish}" if note.finish else "")
