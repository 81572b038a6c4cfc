"""A server while it runs: this thread writes, another one speaks; how both begin, and how they come to an end together."""

import asyncio
import functools
import math
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn

from parallel.errors import Mistake
from research.serving.app import application
from research.serving.connection import Connection
from research.serving.door import Door
from research.serving.engine import Engine, Halt
from research.serving.service import Service
from research.writer import Writer

Say = Callable[[str], None]
JOIN = 10.0
"""Seconds for the event loop to end once every text has."""


class Running:
    """`run` in the thread that owns the writer; `stop` from anywhere, a signal's handler too."""

    def __init__(self, service: Service, writer: Writer, listener: socket.socket, say: Say) -> None:
        self.service = service
        self.engine = Engine(writer, service.desk.hand_out, service.metrics)
        service.desk.engine = self.engine
        self._listener = listener
        self._server = uvicorn.Server(_config(Door(application(service), service.access, service.metrics, say), service))
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
