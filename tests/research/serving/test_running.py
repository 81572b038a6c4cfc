"""How a server ends: texts get their grace, then streams end properly; the slots are free and the thread is gone."""

import json
import threading
import time

import pytest

pytest.importorskip("fastapi")

from tests.research.serving.servers import PATIENCE, served, until

LONG = {"prompt": "war", "max_tokens": 90_000, "temperature": 0, "stream": True}


def reading(server, asked: dict, stop_after: int) -> list[str]:
    """The lines of a stream, in the middle of which the server is stopped."""
    with server.client() as client, client.stream("POST", "/v1/completions", json=asked) as response:
        lines = []
        for line in response.iter_lines():
            lines.append(line)
            if len(lines) == stop_after:
                server.running.stop()
        return [line for line in lines if line]


def test_a_stream_that_does_not_end_in_time_ends_with_an_error_and_done(small):
    with served(small, "--context", "100000", "--grace_seconds", "0.3") as server:
        lines = reading(server, LONG, 5)
        assert lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["error"]["code"] == "shutting_down"
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()


def test_one_that_ends_in_time_ends_as_ever(small):
    with served(small, "--context", "100000", "--grace_seconds", "60") as server:
        lines = reading(server, LONG | {"max_tokens": 200}, 5)
        assert lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["choices"][0]["finish_reason"] == "length"
        begun = time.monotonic()
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive() and time.monotonic() - begun < 30, "it waited for the grace though nothing was left"


def test_the_second_time_there_is_no_grace(small):
    with served(small, "--context", "100000", "--grace_seconds", "600") as server:
        threading.Timer(0.5, server.running.stop).start()
        lines = reading(server, LONG, 5)
        assert json.loads(lines[-2][6:])["error"]["code"] == "shutting_down"


def test_while_it_ends_nothing_new_is_taken(small):
    with served(small, "--context", "100000", "--grace_seconds", "1") as server, server.client() as client:
        assert client.get("/health").status_code == 200
        server.running.service.desk.closed = True
        assert client.get("/health").status_code == 503
        refused = client.post("/v1/completions", json={"prompt": "war"})
        assert refused.status_code == 503 and "retry-after" in refused.headers
        server.running.service.desk.closed = False


def test_an_error_of_the_engine_ends_the_server(small, monkeypatch):
    with pytest.raises(RuntimeError, match="broken"), served(small) as server:

        def broken():
            raise RuntimeError("broken")

        monkeypatch.setattr(server.running.engine.writer, "step", broken)
        answer = server.post("/v1/completions", prompt="war")
        assert answer.status_code in (500, 503)
        until(lambda: not server.thread.is_alive())
