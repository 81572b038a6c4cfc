"""The FastAPI app: its routes, the responses to errors, the chat page, and the ASGI middleware for access, log and metrics.

Request bodies are read and checked by hand (requests.py), because FastAPI would read a body of any size before it is checked.
"""

import asyncio
import datetime
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parallel.errors import Mistake
from research.serving import prometheus
from research.serving.access import Access
from research.serving.endpoints import ChatEndpoint, CompletionEndpoint
from research.serving.errors import ApiError, shutting_down
from research.serving.executor import BoundedExecutor
from research.serving.prometheus import Metrics
from research.serving.request_queue import PendingRequest
from research.serving.requests import ChatRequest, CompletionRequest, parse_json, read_body, validate
from research.serving.responses import CompletionResponse, Endpoint, RequestLog, to_json
from research.serving.service import Service

PAGE_FOLDER = Path(__file__).resolve().parent / "page"
SCRIPTS = ("page.js", "chat.js", "text.js", "turn.js", "settings.js", "server.js")
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    **{f"/{name}": (name, "text/javascript") for name in SCRIPTS},
}
"""Path -> file and type."""
PAGE_DATA = "/page.json"
"""What the page shows of the model. Unlike the page's files it needs the token, because it holds lines of the held-out text."""
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        *(f"{name}-src 'self'" for name in ("script", "style", "connect")),
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
"""Lets the browser load nothing but the page's own files."""
STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
SECURITY_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
OPEN_PATHS = (*PAGE_FILES, "/health")
"""Paths that need no token: the chat page, which asks for it, and the health check."""
KNOWN_PATHS = (*OPEN_PATHS, PAGE_DATA, "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
"""Paths by name in the log and the metrics; all others are `other`."""
READ = ["GET", "HEAD"]
"""The methods of everything that can be read. The response to HEAD is that to GET; uvicorn leaves its body out."""
QUIET_PATHS = ("/health", "/metrics")
"""Paths that monitoring requests every few seconds. Only their errors are logged."""

Result = TypeVar("Result")


def make_app(service: Service) -> FastAPI:
    """Creates the app of one server."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    _add_error_handlers(app)
    _add_chat_page(app)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await respond(
            service, request, service.intake, lambda table: CompletionEndpoint(service, validate(CompletionRequest, table))
        )

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await respond(service, request, service.conversations, lambda table: ChatEndpoint(service, validate(ChatRequest, table)))

    @app.api_route("/v1/models", methods=READ)
    @app.api_route("/v1/models/", methods=READ)
    async def models() -> Response:
        return json_response({"object": "list", "data": [service.model_card()]})

    @app.api_route("/v1/models/{name:path}", methods=READ)
    async def model(name: str) -> Response:
        service.check_model(name)
        return json_response(service.model_card())

    @app.api_route(PAGE_DATA, methods=READ)
    async def page_data() -> Response:
        return json_response(service.page_data())

    @app.api_route("/health", methods=READ)
    async def health() -> Response:
        if service.request_queue.closed:
            raise shutting_down()
        return json_response({"status": "ok"})

    @app.api_route("/metrics", methods=READ)
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"content-type": prometheus.CONTENT_TYPE})

    return app


def _add_chat_page(app: FastAPI) -> None:
    """Adds a route for each file of the chat page. The files are read now."""

    def add(path: str, content: bytes, headers: dict[str, str]) -> None:
        async def send() -> Response:
            return Response(content, headers=headers)

        app.add_api_route(path, send, methods=READ)

    for path, (name, content_type) in PAGE_FILES.items():
        headers = {
            "content-type": f"{content_type}; charset=utf-8",
            "content-security-policy": CONTENT_SECURITY_POLICY,
            "cache-control": "no-cache",
        }
        add(path, (PAGE_FOLDER / name).read_bytes(), headers)


def _add_error_handlers(app: FastAPI) -> None:
    """Every error becomes a response in OpenAI's format."""

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, ApiError):
            api_error = error
        elif isinstance(error, Mistake):  # the library rejects a value that no check of the request's fields has found
            api_error = ApiError(400, str(error), code="invalid_value")
        elif isinstance(error, HTTPException):
            api_error = _routing_error(request, error)
        else:
            api_error = ApiError(500, "the server has met an error, which its log shows", code="internal")
        return error_response(api_error)

    for error_type in (ApiError, Mistake, HTTPException, Exception):
        app.add_exception_handler(error_type, handle)


def _routing_error(request: Request, error: HTTPException) -> ApiError:
    """No such path (404), or not with this method (405)."""
    path, headers = request.url.path[:100], dict(error.headers or {})
    if "Allow" in headers:
        headers["Allow"] = ", ".join(sorted(headers["Allow"].split(", ")))
        message = f"{path} does not take the method {request.method[:20]} → use {headers['Allow'].replace(', ', ' or ')}"
        return ApiError(error.status_code, message, code="method_not_allowed", headers=headers)
    paths = "GET /v1/models /health /metrics, POST /v1/completions /v1/chat/completions"
    return ApiError(error.status_code, f"{request.method[:20]} {path} is not here → {paths}", code="not_found", headers=headers)


def error_response(error: ApiError) -> Response:
    """The response to a request that fails before its response has begun."""
    return json_response(error.body(), error.status, error.headers)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response whose body is JSON on one line."""
    return Response(to_json(value), status, {"content-type": "application/json", **(headers or {})})


async def respond(
    service: Service, request: Request, executor: BoundedExecutor, make_endpoint: Callable[[dict[str, Any]], Endpoint]
) -> Response:
    """Reads, checks and queues a request. Returns the whole response, or the beginning of a stream once the request is queued.

    Whatever takes more than a moment runs in threads, `make_endpoint` in those of `executor`, and is given up if the client leaves.
    """
    if service.request_queue.closed:
        raise shutting_down()
    log: RequestLog = request.scope["request_log"]

    async def checked(body: bytes) -> Endpoint:
        table = await service.intake.run(parse_json, body, service.limits.depth)
        return await executor.run(make_endpoint, table)

    pending: PendingRequest | None = None
    try:
        body = await read_body(request.headers, request.stream(), service.limits)
        endpoint = await run_until_disconnect(request.receive, checked(body))
        log.prompt = endpoint.prompt_tokens
        pending = service.request_queue.submit(endpoint.jobs)
        response = CompletionResponse(endpoint, pending, log)
        service.metrics.prompt(endpoint.prompt_tokens)
        if endpoint.request.stream:
            pending = None  # from here on it is the stream's
            return EventStream(response)
        content = await run_until_disconnect(request.receive, response.whole())
        return Response(content, headers={"content-type": "application/json"})
    except (ClientDisconnected, ClientDisconnect):
        log.finish = "the client has left"
        return Response(status_code=499)  # only the log and the metrics see it
    finally:
        if pending is not None:
            service.request_queue.cancel(pending)


class EventStream(Response):
    """Sends server-sent events. If the client disconnects, its texts are cancelled and their slots become free."""

    def __init__(self, response: CompletionResponse) -> None:
        super().__init__(headers=STREAM_HEADERS)
        self.response = response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the headers, then each event as it comes."""

        async def send_events() -> None:
            headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for event in self.response.events():
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await run_until_disconnect(receive, send_events())
        except ClientDisconnected:
            self.response.log.finish = "the client has left"
        finally:
            self.response.endpoint.service.request_queue.cancel(self.response.pending)


class ClientDisconnected(Exception):
    """The client has closed its connection before it received the response."""


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Returns the result of `work`. If the client disconnects first, cancels `work` and raises ClientDisconnected.

    The request's body must have been read before.
    """

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnected
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class Middleware:
    """ASGI middleware around the app: checks access, adds security headers, logs each request and counts it in the metrics."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics, log: Callable[[str], None]) -> None:
        self.app, self.access, self.metrics, self.log = app, access, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        started, request_log, status = time.monotonic(), RequestLog(), 500
        path = scope["path"] if scope["path"] in KNOWN_PATHS else "other"

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *SECURITY_HEADERS]
            await send(message)

        try:
            app = self.app
            if self.access.token is None or scope["path"] not in OPEN_PATHS:
                try:
                    self.access.check(Headers(scope=scope))
                except ApiError as error:
                    app = error_response(error)
            await app({**scope, "request_log": request_log}, receive, send_with_headers)
        finally:
            seconds = time.monotonic() - started
            self.metrics.request(path, status, seconds)
            if path not in QUIET_PATHS or status >= 400:
                self.log(log_line(scope["method"], path, status, seconds, request_log))


def log_line(method: str, path: str, status: int, seconds: float, log: RequestLog) -> str:
    """`12:00:01  POST /v1/completions  200  7 + 16 tokens  0.31 s  length`."""
    now = datetime.datetime.now().strftime("%H:%M:%S")
    method = method if method.isalpha() else "?"
    tokens = f"  {log.prompt} + {log.written} tokens" if log.prompt else ""
    return f"{now}  {method[:10]} {path}  {status}{tokens}  {seconds:.2f} s" + (f"  {log.finish}" if log.finish else "")
