"""The server's addresses, and what each answers. FastAPI routes; bodies are read and checked by hand, within bounds."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from parallel.errors import Mistake
from research.serving import body, metrics, pages, schema
from research.serving.answers import Answer, Note, Shape, encoded
from research.serving.chats import Chats
from research.serving.completions import Completions
from research.serving.refusal import Refusal, closing
from research.serving.service import Service

JSON = "application/json"
STREAM = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
Result = TypeVar("Result")
Understood = Callable[[Service, dict[str, Any]], Shape]


class Gone(Exception):
    """The client has left."""


def application(service: Service) -> FastAPI:
    """The routes, of one server."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(Mistake, _mistaken)
    app.add_exception_handler(HTTPException, _not_routed)
    app.add_exception_handler(Exception, _broken)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answered(service, request, lambda service, value: Completions(service, schema.completion(value)))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answered(service, request, lambda service, value: Chats(service, schema.chat(value)))

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
        return Response(service.metrics.text(), headers={"content-type": metrics.CONTENT_TYPE})

    pages.add(app)
    return app


async def answered(service: Service, request: Request, understood: Understood) -> Response:
    """Reads, checks and queues a request; the answer comes whole, or as events once it has been accepted."""
    value = await body.read(request.headers, request.stream(), service.limits)
    shape = await asyncio.to_thread(understood, service, value)
    note: Note = request.scope["note"]
    note.prompt = shape.prompt_tokens
    answer = Answer(shape, service.desk.open(shape.jobs), note)
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

    def __init__(self, answer: Answer) -> None:
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


def refused(refusal: Refusal) -> Response:
    """A refusal as it goes out."""
    return _json(refusal.body(), refusal.status, refusal.headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return refused(error)


async def _mistaken(request: Request, error: Exception) -> Response:
    """What the library refuses and no field's check has seen before."""
    return refused(Refusal(400, str(error), code="invalid_value"))


async def _not_routed(request: Request, error: Exception) -> Response:
    """An address that is not there, or not with this method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method[:20]} {request.url.path[:100]} is not here"
    ways = "GET /v1/models /health /metrics, POST /v1/completions /v1/chat/completions"
    return refused(Refusal(error.status_code, f"{what} → {ways}", code="not_found", headers=error.headers))


async def _broken(request: Request, error: Exception) -> Response:
    return refused(Refusal(500, "the server has met an error, which its log shows", code="internal"))
