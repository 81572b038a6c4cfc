"""Threads for work on requests that takes more than a moment: parsing, tokenizing, rendering chat templates.

Each kind of work has its own BoundedExecutor, so that requests of one kind that are slow do not hold up those of another.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from research.serving.errors import ApiError

Result = TypeVar("Result")


class BoundedExecutor:
    """A few threads, and a bound on the calls that run or wait. `run` belongs to the event loop's thread, `close` to any."""

    def __init__(self, name: str, threads: int, waiting: int, retry_after: int) -> None:
        """Refuses a call if `threads` of them run and `waiting` wait. The refusal says to ask again in `retry_after` seconds."""
        self.name, self.capacity, self.retry_after = name, threads + waiting, retry_after
        self._free = threading.Semaphore(self.capacity)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Returns the function's result. Raises an ApiError (429) if there is no place for the call.

        A call that is cancelled while it waits never runs. One that is running goes on, and keeps its place until it has ended.
        """
        if not self._free.acquire(blocking=False):
            message = f"{self.capacity} requests are in {self.name} or wait for it, {self.capacity} is the most"
            headers = {"retry-after": str(self.retry_after)}
            raise ApiError(429, f"{message} → ask again in {self.retry_after} s", code="queue_full", headers=headers)
        future: Future[Result] = self._pool.submit(function, *arguments)
        future.add_done_callback(lambda _: self._free.release())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Drops the calls that wait. Those that run end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)
