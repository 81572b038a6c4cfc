"""The HTTP server: restores a model, starts the engine and uvicorn in two threads, and shuts both down together."""

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

import uvicorn

from models.config import GPT
from models.encoder_config import T5
from parallel.checkpoint.folder import step_of
from parallel.distributed import PRECISIONS
from parallel.errors import Mistake
from research import ROOT
from research.cluster.memory import MB, HostMemory
from research.cluster.tensor_ranks import opened
from research.data.fill_in_middle import Sentinels
from research.data.tokenizer import Tokenizer
from research.data.tokenizer_file import ends_of
from research.generation.chat_template import ChatTemplate, chat_template_of
from research.generation.generator import TextGenerator
from research.generation.restore import DecoderSpec
from research.generation.sources import SourceForm
from research.serving.access import Access
from research.serving.app import Middleware, make_app
from research.serving.connection import Connection
from research.serving.engine import Engine, Halt
from research.serving.executor import BoundedExecutor
from research.serving.limits import Limits
from research.serving.prometheus import Metrics
from research.serving.request_queue import RequestQueue
from research.serving.service import Service

THREADS = 2
"""Of each executor: one request that takes long does not hold up all others."""
BACKLOG = 2048
"""Connections that may wait to be accepted."""
CLOSING_SECONDS, JOIN_SECONDS = 5, 10.0
"""Once every text has ended: how long clients have to read their responses, and how long the event loop may take to end."""
Log = Callable[[str], None]


@dataclass(frozen=True)
class ServerSpec:
    """A trained model and how to serve it: what `serve` has checked before torch is imported."""

    title: str
    """The run's title, which is the name of the model in responses."""
    folder: Path
    checkpoint: Path
    model: GPT | T5
    source: SourceForm | None
    """What surrounds prompts that are sources; None if texts continue their prompts."""
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
    sentinels: Sentinels | None
    """Of a model that was trained to fill in a middle."""
    listener: socket.socket
    """Bound to the address, and not listening yet."""


@contextlib.contextmanager
def make_server(spec: ServerSpec, log: Log) -> Iterator["Running"]:
    """Restores the model on `spec.tensor` ranks of this machine and yields a server to which clients can connect.

    They are answered from `run` on. Before the model is restored, connections are refused.
    """
    end_ids, memory = ends_of(spec.tokenizer, ROOT), HostMemory()
    decoder_spec = DecoderSpec(
        spec.folder, spec.checkpoint, spec.precision, spec.slots, spec.context, None if spec.source is None else spec.source.start
    )
    limits = spec.limits
    with (
        chat_template_of(
            spec.tokenizer, ROOT, end_ids, limits.template_seconds, 2 * limits.characters, spec.template, spec.template_name
        ) as chat_template,
        opened(decoder_spec, spec.tensor) as decoder,
        contextlib.closing(BoundedExecutor("the parser", THREADS, limits.connections, 1)) as intake,
        contextlib.closing(
            BoundedExecutor("the chat template", THREADS, limits.template_queue, math.ceil(limits.template_seconds))
        ) as conversations,
    ):
        generator = TextGenerator(decoder, spec.tokenizer, spec.model, spec.context, end_ids, spec.source)
        metrics = Metrics(spec.slots, before_model=memory.before * MB)
        dtype = next(decoder.module.parameters()).dtype
        service = Service(
            name=spec.title,
            step=step_of(spec.checkpoint),
            precision=next(name for name, known in PRECISIONS.items() if known == dtype),
            created=int(time.time()),
            model=spec.model,
            source=spec.source,
            tokenizer=spec.tokenizer,
            context=spec.context,
            slots=spec.slots,
            end_ids=end_ids,
            sentinels=spec.sentinels,
            chat_template=chat_template,
            example_prompts=spec.example_prompts,
            limits=limits,
            access=Access(spec.token),
            metrics=metrics,
            request_queue=RequestQueue(spec.slots, limits, metrics),
            intake=intake,
            conversations=conversations if isinstance(chat_template, ChatTemplate) else intake,
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
        """Rejects new requests and lets texts finish for up to `grace_seconds`. A second call ends them at once.

        Until then, clients can connect and are told that the server is shutting down.
        """
        queue = self.service.request_queue
        if queue.closed or queue.loop is None:
            queue.closed = True
            self.engine.commands.put(Halt())
            return
        queue.closed = True
        with contextlib.suppress(RuntimeError):  # the loop is closed, so the engine has been told to end
            queue.loop.call_soon_threadsafe(queue.end_if_drained)
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
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
