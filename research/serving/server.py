"""The HTTP server: restores a model, starts the engine and uvicorn in two threads, and shuts both down together.

Connection is uvicorn's HTTP connection with timeouts. uvicorn itself waits without limit for the headers of a new connection, for the
rest of a body that nobody reads any more, and for a client that does not read; and its errors are not in OpenAI's format.
"""

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
from research.cluster.memory import MB, HostMemory
from research.cluster.tensor_ranks import opened
from research.data.tokenizer import Tokenizer
from research.data.tokenizer_file import ends_of, special_tokens_of, template_of
from research.generation.generator import TextGenerator
from research.generation.restore import DecoderSpec
from research.serving.access import Access
from research.serving.app import Middleware, make_app
from research.serving.chat_template import ChatTemplate, PlainTemplate, TemplateRenderer
from research.serving.engine import Engine, Halt
from research.serving.errors import ApiError
from research.serving.limits import Limits
from research.serving.prometheus import Metrics
from research.serving.request_queue import RequestQueue
from research.serving.responses import to_json
from research.serving.service import Service

LINGER_SECONDS = 1.0
"""How long a client may go on sending the body of a request that has been answered, so that it gets to read the answer."""
BACKLOG = 2048
"""Connections that may wait to be accepted."""
JOIN_SECONDS = 10.0
"""How long the event loop may take to end once every text has ended."""
TOO_MANY_CONNECTIONS = ApiError(503, "the server has as many connections as it takes → come back later", code="too_many_connections")
Log = Callable[[str], None]


@dataclass(frozen=True)
class ServerSpec:
    """A trained model and how to serve it: what `serve` has checked before torch is imported."""

    title: str
    """The run's title, which is the name of the model in responses."""
    folder: Path
    checkpoint: Path
    model: GPT
    tokenizer: Tokenizer
    precision: str | None
    """None: the precision of the training."""
    tensor: int
    slots: int
    context: int
    """Number of tokens that a prompt and its text may have together."""
    limits: Limits
    token: str | None
    template: str | None
    """The text of a chat template. None: the run's own one, or a plain layout if it has none."""
    template_name: str
    example_prompts: tuple[str, ...]
    listener: socket.socket
    """Bound to the address, and not listening yet."""


@contextlib.contextmanager
def make_server(spec: ServerSpec, log: Log) -> Iterator["Running"]:
    """Restores the model on `spec.tensor` ranks of this machine and yields a server to which clients can connect.

    They are answered from `run` on. Before the model is restored, connections are refused.
    """
    end_ids, memory = ends_of(spec.tokenizer, ROOT), HostMemory()
    decoder_spec = DecoderSpec(spec.folder, spec.checkpoint, spec.precision, spec.slots, spec.context)
    with chat_template_of(spec, end_ids) as chat_template, opened(decoder_spec, spec.tensor) as decoder:
        generator = TextGenerator(decoder, spec.tokenizer, spec.model, spec.context, end_ids)
        metrics = Metrics(spec.slots, before_model=memory.before * MB)
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
            end_ids=end_ids,
            chat_template=chat_template,
            example_prompts=spec.example_prompts,
            limits=spec.limits,
            access=Access(spec.token),
            metrics=metrics,
            request_queue=RequestQueue(spec.slots, spec.limits, metrics),
        )
        _listen(spec.listener)
        yield Running(service, generator, spec.listener, log)


def _listen(listener: socket.socket) -> None:
    """Raises a Mistake if another server has begun to listen at the address since it was bound."""
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        problem = f"--host {host} --port {port} cannot be used ({error.strerror})"
        raise Mistake(f"{problem} → another --port, 0 for any that is free") from None


@contextlib.contextmanager
def chat_template_of(spec: ServerSpec, end_ids: tuple[int, ...]) -> Iterator[PlainTemplate | ChatTemplate]:
    """Yields the chat template that the command names, else the run's own one, else the plain layout."""
    source = spec.template or template_of(spec.tokenizer, ROOT)
    if source is None:
        yield PlainTemplate(spec.tokenizer, end_ids)
        return
    renderer = TemplateRenderer(source, spec.limits.template_seconds)
    try:
        yield ChatTemplate(spec.tokenizer, renderer.render, special_tokens_of(spec.tokenizer, ROOT), end_ids, spec.template_name)
    finally:
        renderer.close()


class Running:
    """A server. `run` blocks in the thread that owns the model; `stop` may be called from any thread and from a signal handler."""

    def __init__(self, service: Service, generator: TextGenerator, listener: socket.socket, log: Log) -> None:
        self.service = service
        self.engine = Engine(generator, service.request_queue.deliver, service.metrics)
        service.request_queue.engine = self.engine
        self._listener = listener
        self._server = uvicorn.Server(_uvicorn_config(Middleware(make_app(service), service.access, service.metrics, log), service.limits))
        self._error: BaseException | None = None

    def run(self) -> None:
        """Serves until `stop` is called. The engine runs in this thread, the event loop in another one."""
        thread = threading.Thread(target=self._run_event_loop, daemon=True)
        thread.start()
        try:
            self.engine.run()
        finally:
            self.service.request_queue.closed = self._server.should_exit = True
            thread.join(JOIN_SECONDS)
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Rejects new requests and lets texts finish for up to `grace_seconds`. A second call ends them at once."""
        if self.service.request_queue.closed:
            self.engine.commands.put(Halt())
            return
        self.service.request_queue.closed = self._server.should_exit = True
        timer = threading.Timer(self.service.limits.grace_seconds, self.engine.commands.put, [Halt()])
        timer.daemon = True  # if everything ends sooner, the process does not wait for the timer
        timer.start()

    def _run_event_loop(self) -> None:
        async def serve() -> None:
            self.service.request_queue.loop = asyncio.get_running_loop()
            await self._server.serve(sockets=[self._listener])

        try:
            asyncio.run(serve())
        except BaseException as error:
            self._error = error
        finally:
            self.engine.commands.put(Halt())


def _uvicorn_config(app: Any, limits: Limits) -> uvicorn.Config:
    """uvicorn with h11, without its own log lines and Server header, and without trusting the headers of a proxy."""
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
        backlog=BACKLOG,
        h11_max_incomplete_event_size=limits.head_bytes,
        timeout_keep_alive=math.ceil(limits.idle_seconds),
        timeout_graceful_shutdown=math.ceil(limits.grace_seconds) + 2,
    )


class Connection(H11Protocol):
    """A client's connection with timeouts: for the next request's headers, and for a client that does not read its response."""

    def __init__(self, limits: Limits, **uvicorn_arguments: Any) -> None:
        super().__init__(**uvicorn_arguments)
        self.limits = limits
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
            self._reject(ApiError(400, f"{msg} → {way_out}", code="invalid_http"))
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
