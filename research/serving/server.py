"""A server while it runs: this thread writes, another one speaks; how both begin, and how they come to an end together."""
# MERGED-DOC """uvicorn's connection, with a time for everything that a client may leave undone, and OpenAI's shape for what is no HTTP.
# MERGED-DOC
# MERGED-DOC uvicorn itself waits for ever for the headers of a new connection, for the rest of a body that nobody reads any more, and for a
# MERGED-DOC client that does not read.
# MERGED-DOC """

import asyncio
import contextlib
import functools
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from models.config import GPT
from parallel.checkpoint.folder import step_of
from parallel.distributed import PRECISIONS
from parallel.errors import Mistake
from research import ROOT
from research.cluster.tensor_ranks import opened
from research.data.tokenizer import Tokenizer
from research.data.tokenizer_file import ends_of, special_tokens_of, template_of
from research.generation.generator import TextGenerator
from research.generation.restore import DecoderSpec
from research.serving.access import Access
from research.serving.app import Middleware, application
from research.serving.chat_template import ChatTemplate, Conversation, PlainTemplate, Renderer
from research.serving.engine import Engine, Halt
from research.serving.errors import ApiError
from research.serving.limits import Limits
from research.serving.prometheus import Metrics
from research.serving.request_queue import RequestQueue
from research.serving.responses import encoded
from research.serving.service import Service

LINGER = 1.0
"""Seconds in which a client may go on sending what has been answered already, so that it gets to read the answer."""
FULL = ApiError(503, "the server has as many connections as it takes → come back later", code="too_many_connections")


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
            self._refuse(ApiError(400, f"{msg} → {way}", code="invalid_http"))
        else:
            self.transport.close()  # in the middle of an answer nothing can be said

    def _wait(self, seconds: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _refuse(self, refusal: ApiError) -> None:
        body = encoded(refusal.body())
        headers = ["content-type: application/json", f"content-length: {len(body)}", "connection: close"]
        head = "\r\n".join([f"HTTP/1.1 {refusal.status} Refused", *headers, "", ""])
        self.transport.write(head.encode() + body)
        self.transport.close()


Say = Callable[[str], None]
JOIN = 10.0
"""Seconds for the event loop to end once every text has."""


class Running:
    """`run` in the thread that owns the writer; `stop` from anywhere, a signal's handler too."""

    def __init__(self, service: Service, writer: TextGenerator, listener: socket.socket, say: Say) -> None:
        self.service = service
        self.engine = Engine(writer, service.desk.hand_out, service.metrics)
        service.desk.engine = self.engine
        self._listener = listener
        self._server = uvicorn.Server(_config(Middleware(application(service), service.access, service.metrics, say), service))
        self._error: BaseException | None = None

    def run(self) -> None:
        """Serves until it is stopped."""
        thread = threading.Thread(target=self._speak, daemon=True)
        thread.start()
        try:
            self.engine.run()
        finally:
            self.service.desk.closed = self._server.should_exit = True
            thread.join(JOIN)
        if isinstance(self._error, OSError):
            raise Mistake(f"the address cannot be listened at ({self._error.strerror}) → another --port, 0 for any that is free")
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """No new request is taken; texts have the grace to come to their end. Asked again: they are ended now."""
        if self.service.desk.closed:
            self.engine.orders.put(Halt())
            return
        self.service.desk.closed = self._server.should_exit = True
        grace = threading.Timer(self.service.limits.grace_seconds, self.engine.orders.put, [Halt()])
        grace.daemon = True  # nothing waits for it where all is over sooner
        grace.start()

    def _speak(self) -> None:
        """The other thread's whole life."""
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self.engine.orders.put(Halt())

    async def _serve(self) -> None:
        self.service.desk.loop = asyncio.get_running_loop()
        await self._server.serve(sockets=[self._listener])


def _config(app: Any, service: Service) -> uvicorn.Config:
    """h11 and nothing of uvicorn's own words: no logs, no Server header, no trust in a proxy's."""
    limits = service.limits
    return uvicorn.Config(
        app,
        http=functools.partial(Connection, limits),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=limits.head_bytes,
        timeout_keep_alive=math.ceil(limits.idle_seconds),
        timeout_graceful_shutdown=math.ceil(limits.grace_seconds) + 2,
    )


@dataclass(frozen=True)
class ServerSpec:
    """A trained model and how it is to be served: everything that `serve` has checked before torch is imported."""

    title: str
    """Of the run: the model's name in answers."""
    folder: Path
    checkpoint: Path
    model: GPT
    tokenizer: Tokenizer
    precision: str | None
    """None: as trained."""
    tensor: int
    slots: int
    context: int
    """Tokens that a prompt and its text may have together."""
    limits: Limits
    token: str | None
    template: str | None
    """The text of a chat template; None: the run's own, or a plain layout where it has none."""
    template_name: str
    listener: socket.socket
    """Bound, and not listening yet."""


@contextlib.contextmanager
def ready(spec: ServerSpec, say: Say) -> Iterator[Running]:
    """The model, restored on `spec.tensor` ranks of this machine, behind a server that has not begun."""
    ends = ends_of(spec.tokenizer, ROOT)
    plan = DecoderSpec(spec.folder, spec.checkpoint, spec.precision, spec.slots, spec.context)
    with conversation(spec, ends) as template, opened(plan, spec.tensor) as decoder:
        writer = TextGenerator(decoder, spec.tokenizer, spec.model, spec.context, ends)
        metrics = Metrics(spec.slots)
        dtype = next(decoder.module.parameters()).dtype
        service = Service(
            name=spec.title,
            step=step_of(spec.checkpoint),
            precision=next(name for name, known in PRECISIONS.items() if known == dtype),
            created=int(time.time()),
            model=spec.model,
            tokenizer=spec.tokenizer,
            context=spec.context,
            slots=spec.slots,
            ends=ends,
            conversation=template,
            limits=spec.limits,
            access=Access(spec.token),
            metrics=metrics,
            desk=RequestQueue(spec.slots, spec.limits, metrics),
        )
        yield Running(service, writer, spec.listener, say)


@contextlib.contextmanager
def conversation(spec: ServerSpec, ends: tuple[int, ...]) -> Iterator[Conversation]:
    """The layout of a conversation: by the template that was named, by the run's own, or plainly."""
    source = spec.template or template_of(spec.tokenizer, ROOT)
    if source is None:
        yield PlainTemplate(spec.tokenizer, ends)
        return
    renderer = Renderer(source, spec.limits.template_seconds)
    try:
        yield ChatTemplate(spec.tokenizer, renderer.render, special_tokens_of(spec.tokenizer, ROOT), ends, spec.template_name)
    finally:
        renderer.close()
