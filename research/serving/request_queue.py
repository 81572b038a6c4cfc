"""The request queue: limits how many texts are waiting or being generated, and passes a request's texts to the engine and back.

Texts beyond the engine's slots wait in the scheduler of the TextGenerator. When `limits.queue` texts are waiting, new requests are
rejected with status 429 and a Retry-After header.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from research.serving.engine import FAILED, Cancel, Engine, Halt, Job, Piece, Submit
from research.serving.errors import ApiError, shutting_down
from research.serving.limits import Limits
from research.serving.prometheus import Metrics

RETRY_AFTER = 1
"""Seconds after which a client that was rejected because the queue is full may send its request again."""


@dataclass(eq=False)
class PendingRequest:
    """The jobs of one request, and a queue of (index of a job, Piece). The queue holds at most one piece per token."""

    jobs: tuple[Job, ...]
    started: float
    """On the clock of time.monotonic, which is also the event loop's."""
    timeout: float
    """Seconds, waiting included."""
    pieces: asyncio.Queue[tuple[int, Piece]] = field(default_factory=asyncio.Queue)


class RequestQueue:
    """Submits requests to the engine and receives its pieces. Everything but `deliver` runs in the event loop's thread."""

    def __init__(self, slots: int, limits: Limits, metrics: Metrics) -> None:
        self.capacity, self.timeout, self.metrics = slots + limits.queue, limits.request_seconds, metrics
        self.occupied = 0
        """Number of texts that were submitted and have not ended."""
        self.closed = False
        """Whether new requests are rejected. Any thread may set it."""
        self.loop: asyncio.AbstractEventLoop | None = None
        self.engine: Engine | None = None
        self._pending: dict[Job, tuple[PendingRequest, int]] = {}

    def submit(self, jobs: list[Job]) -> PendingRequest:
        """Passes the jobs to the engine. Raises an ApiError if there is no room for all of them."""
        if self.closed or self.engine is None:
            raise shutting_down()
        if len(jobs) > self.capacity:
            message = f"n and prompt ask for {len(jobs)} texts, there is room for {self.capacity} → ask for fewer"
            raise ApiError(400, message, "n", "too_many")
        if self.occupied + len(jobs) > self.capacity:
            message = f"{self.capacity} texts are being written or wait already → ask again in {RETRY_AFTER} s"
            raise ApiError(429, message, code="queue_full", headers={"retry-after": str(RETRY_AFTER)})
        request = PendingRequest(tuple(jobs), time.monotonic(), self.timeout)
        self.occupied += len(jobs)
        self._pending.update({job: (request, i) for i, job in enumerate(jobs)})
        self.engine.commands.put(Submit(jobs))
        return request

    def cancel(self, request: PendingRequest) -> None:
        """Cancels the jobs that have not ended. Their places become free when the engine has confirmed it."""
        unfinished = [job for job in request.jobs if job in self._pending]
        if unfinished and self.engine:
            self.engine.commands.put(Cancel(unfinished))

    def deliver(self, pieces: list[tuple[Job, Piece]]) -> None:
        """Passes the pieces of one step to the event loop. The engine's thread calls it."""
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so no request is waiting
                self.loop.call_soon_threadsafe(self._receive, pieces)

    def _receive(self, pieces: list[tuple[Job, Piece]]) -> None:
        for job, piece in pieces:
            if job not in self._pending:
                continue
            request, index = self._pending[job]
            request.pieces.put_nowait((index, piece))
            if piece.finish:
                del self._pending[job]
                self.occupied -= 1
        self.end_if_drained()

    def end_if_drained(self) -> None:
        """Ends the engine if new requests are rejected and the last text has ended."""
        if self.closed and not self.occupied and self.engine is not None:
            self.engine.commands.put(Halt())

    async def pieces(self, request: PendingRequest) -> AsyncIterator[tuple[int, Piece]]:
        """Yields (index of a job, Piece) until every job has ended. Raises an ApiError if a job failed or the request timed out."""
        unfinished, first = len(request.jobs), True
        while unfinished:
            try:
                async with asyncio.timeout_at(request.started + request.timeout):
                    index, piece = await request.pieces.get()
            except TimeoutError:
                message = f"it took more than {request.timeout:g} s → ask for fewer tokens or texts"
                raise ApiError(408, message, code="timeout") from None
            if piece.finish == FAILED:
                raise shutting_down() if self.closed else ApiError(500, piece.error, code="failed")
            if first:
                self.metrics.first_token(time.monotonic() - request.started)
            first = False
            unfinished -= piece.finish is not None
            yield index, piece
