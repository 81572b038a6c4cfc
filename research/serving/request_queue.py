"""One request's texts on their way: how many places they take, the pieces as they come, and that nobody waits for them any more."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from research.serving.engine import FAILED, Cancel, Engine, Job, Piece, Submit
from research.serving.errors import ApiError, busy, closing
from research.serving.limits import Limits
from research.serving.prometheus import Metrics


@dataclass(eq=False)
class PendingRequest:
    """A request's jobs, and a queue of (index of a job, Piece). It holds no more than the jobs' tokens."""

    jobs: tuple[Job, ...]
    begun: float
    """On time.monotonic's clock, as the event loop's is."""
    seconds: float
    """How long it may take."""
    pieces: asyncio.Queue[tuple[int, Piece]] = field(default_factory=asyncio.Queue)


class RequestQueue:
    """Takes calls to the engine and its pieces back. All of it belongs to the event loop's thread, but `hand_out`."""

    def __init__(self, slots: int, limits: Limits, metrics: Metrics) -> None:
        self.room, self.seconds, self.metrics = slots + limits.queue, limits.request_seconds, metrics
        self.taken = 0
        """Texts that the engine has, or will have."""
        self.closed = False
        """Whether no more calls are taken. Set by any thread."""
        self.loop: asyncio.AbstractEventLoop | None = None
        self.engine: Engine | None = None
        self._calls: dict[Job, tuple[PendingRequest, int]] = {}

    def hand_out(self, pieces: list[tuple[Job, Piece]]) -> None:
        """The engine's thread gives the pieces of a step to the event loop."""
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
                self.loop.call_soon_threadsafe(self._receive, pieces)

    def open(self, jobs: list[Job]) -> PendingRequest:
        """Gives the jobs to the engine; a Refusal where there is no room for them."""
        if self.closed or self.engine is None:
            raise closing()
        if len(jobs) > self.room:
            raise ApiError(400, f"n and prompt ask for {len(jobs)} texts, there is room for {self.room} → ask for fewer", "n", "too_many")
        if self.taken + len(jobs) > self.room:
            raise busy(self.room)
        call = PendingRequest(tuple(jobs), time.monotonic(), self.seconds)
        self.taken += len(jobs)
        self._calls.update({job: (call, i) for i, job in enumerate(jobs)})
        self.engine.orders.put(Submit(jobs))
        return call

    def leave(self, call: PendingRequest) -> None:
        """Nobody waits for the rest. Their places are free when the engine has heard of it."""
        left = [job for job in call.jobs if job in self._calls]
        if left and self.engine:
            self.engine.orders.put(Cancel(left))

    async def pieces(self, call: PendingRequest) -> AsyncIterator[tuple[int, Piece]]:
        """What comes, until every job has ended. A Refusal where one failed, or where it takes too long."""
        left, first = len(call.jobs), True
        while left:
            try:
                async with asyncio.timeout_at(call.begun + call.seconds):
                    index, piece = await call.pieces.get()
            except TimeoutError:
                raise ApiError(408, f"it took more than {call.seconds:g} s → ask for fewer tokens or texts", code="timeout") from None
            if piece.finish == FAILED:
                raise closing() if self.closed else ApiError(500, piece.error, code="failed")
            if first:
                self.metrics.first(time.monotonic() - call.begun)
            first = False
            left -= piece.finish is not None
            yield index, piece

    def _receive(self, pieces: list[tuple[Job, Piece]]) -> None:
        for job, piece in pieces:
            if job not in self._calls:
                continue
            call, index = self._calls[job]
            call.pieces.put_nowait((index, piece))
            if piece.finish:
                del self._calls[job]
                self.taken -= 1
