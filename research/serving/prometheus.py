"""What a Prometheus reads at /metrics: how many asked, how much was written, how long it took, how full it is."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STEPS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
WAITS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """One server's, in a registry of their own. Any thread may count."""

    def __init__(self, slots: int) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry, "namespace": "tessera"}
        ProcessCollector(registry=self.registry)
        Gauge("slots", "Texts that can be written at once", **made).set(slots)
        self._used = Gauge("slots_used", "Texts being written", **made)
        self._waiting = Gauge("texts_waiting", "Texts that wait for a slot", **made)
        self._requests = Counter("requests", "Answered requests", ("path", "status"), **made)
        self._texts = Counter("texts", "Texts that have ended", ("finish",), **made)
        self._tokens = Counter("tokens", "Tokens read (prompt) and written", ("kind",), **made)
        self._step = Histogram("step_seconds", "One token of every text in a slot, or the prompts of newcomers", buckets=STEPS, **made)
        self._first = Histogram("first_token_seconds", "From a request to the first piece of its text", buckets=WAITS, **made)
        self._seconds = Histogram("request_seconds", "From a request to the end of its answer", ("path",), buckets=WAITS, **made)

    def rows(self, used: int, waiting: int) -> None:
        """How full the batch is."""
        self._used.set(used)
        self._waiting.set(waiting)

    def step(self, seconds: float, tokens: int) -> None:
        """One step, and how many tokens it wrote."""
        self._step.observe(seconds)
        self._tokens.labels("written").inc(tokens)

    def ended(self, finish: str) -> None:
        """A text's end, and why."""
        self._texts.labels(finish).inc()

    def prompt(self, tokens: int) -> None:
        """A prompt that was accepted."""
        self._tokens.labels("prompt").inc(tokens)

    def first(self, seconds: float) -> None:
        """The wait for a request's first piece."""
        self._first.observe(seconds)

    def request(self, path: str, status: int, seconds: float) -> None:
        """An answered request. `path` is one of a few."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
