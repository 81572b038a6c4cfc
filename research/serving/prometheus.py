"""Prometheus metrics of the server at /metrics: requests, tokens, durations, and the use of slots and queue."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STEP_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
REQUEST_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The metrics of one server, in their own registry. Any thread may call the methods."""

    def __init__(self, slots: int, before_model: float = 0.0) -> None:
        """`before_model`: resident bytes of the process before the model was read."""
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry, "namespace": "tessera"}
        ProcessCollector(registry=self.registry)
        Gauge("slots", "Texts that can be written at once", **common).set(slots)
        before = "Resident memory before the model was read, Python and its libraries: subtract it from process_resident_memory_bytes"
        Gauge("memory_before_model_bytes", before, **common).set(before_model)
        self._used = Gauge("slots_used", "Texts being written", **common)
        self._waiting = Gauge("texts_waiting", "Texts that wait for a slot", **common)
        self._requests = Counter("requests", "Answered requests", ("path", "status"), **common)
        self._texts = Counter("texts", "Texts that have ended", ("finish",), **common)
        self._tokens = Counter("tokens", "Tokens read (prompt) and written", ("kind",), **common)
        self._step = Histogram(
            "step_seconds", "One token of every text in a slot, or the prompts of newcomers", buckets=STEP_SECONDS, **common
        )
        self._first = Histogram("first_token_seconds", "From a request to the first piece of its text", buckets=REQUEST_SECONDS, **common)
        self._seconds = Histogram(
            "request_seconds", "From a request to the end of its answer", ("path",), buckets=REQUEST_SECONDS, **common
        )

    def batch(self, used: int, waiting: int) -> None:
        """Sets the number of slots in use and of texts that wait for one."""
        self._used.set(used)
        self._waiting.set(waiting)

    def step(self, seconds: float, tokens: int) -> None:
        """Counts one decoding step and the tokens that it generated."""
        self._step.observe(seconds)
        self._tokens.labels("written").inc(tokens)

    def text_ended(self, finish: str) -> None:
        """Counts a text that has ended, by finish reason."""
        self._texts.labels(finish).inc()

    def prompt(self, tokens: int) -> None:
        """Counts the tokens of a prompt that was accepted."""
        self._tokens.labels("prompt").inc(tokens)

    def first_token(self, seconds: float) -> None:
        """Records the time from a request to the first piece of its text."""
        self._first.observe(seconds)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts a request. `path` is one of a fixed set, so that the number of time series is bounded."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """Returns all metrics in the format that Prometheus reads."""
        return generate_latest(self.registry)
