"""Slow clients and shutdown.

Headers and bodies that arrive byte by byte, responses that are not read, and too many connections do not block other clients. When a
server is stopped, texts may finish within the grace period, streams then end properly, the slots are free and the thread has ended.
"""

import pytest

pytest.importorskip("fastapi")

import json
import socket
import threading
import time

import pytest

from parallel.errors import Mistake
from research.cli.serve import checked_task, parser
from research.serving.server import make_server
from tests.research.serving.helpers.servers import PATIENCE, served, until


def test_one_can_connect_before_the_address_is_printed_and_not_before_the_model_is_there(small):
    """What connects is answered once the server runs. An address that another server has taken meanwhile is one sentence."""
    task = checked_task(parser().parse_args([str(small.path), "--port", "0"]))
    address = task.listener.getsockname()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=PATIENCE)
    with make_server(task.spec(), print) as running, socket.create_connection(address, timeout=PATIENCE) as line:
        line.send(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        thread = threading.Thread(target=running.run)
        thread.start()
        assert line.recv(4000).startswith(b"HTTP/1.1 200")
        running.stop()
        running.stop()
        thread.join(PATIENCE)
    task = checked_task(parser().parse_args([str(small.path), "--port", "0"]))
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(task.listener.getsockname())
        other.listen()
        taken = pytest.raises(Mistake, match=r"--port \d+ cannot be used \(Address already in use\) → another --port")
        with taken, make_server(task.spec(), print):
            pass
    task.listener.close()


HEAD = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
LONG = {"prompt": "war", "max_tokens": 90_000, "temperature": 0, "stream": True, "logprobs": 20}
"""Two kilobytes a token: the system's own buffers are soon full."""
TIMES = ["--head_seconds", "0.5", "--body_seconds", "0.5", "--idle_seconds", "0.5", "--stall_seconds", "0.5"]


@pytest.fixture(scope="module")
def server(small):
    with served(small, "--context", "100000", "--connections", "30", "--head_bytes", "4000", *TIMES) as found:
        found.running._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # so that what is not read is noticed soon
        yield found


def connected(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)


def drip(line: socket.socket, what: bytes, pause: float = 0.05) -> bytes:
    """Sends a byte at a time until the other side has had enough; what it said."""
    line.setblocking(False)
    said, begun = b"", time.monotonic()
    for i in range(10**6):
        assert time.monotonic() - begun < PATIENCE
        try:
            line.send(what[i % len(what) :][:1])
        except BlockingIOError:
            pass
        except OSError:
            return said
        time.sleep(pause)
        try:
            if not (piece := line.recv(65536)):
                return said
            said += piece
        except BlockingIOError:
            pass
        except OSError:
            return said
    raise AssertionError


def answers(server) -> bool:
    return server.post("/v1/completions", prompt="war", max_tokens=2).status_code == 200


def test_headers_that_drip_are_cut_off_and_block_nobody(server):
    many = [connected(server) for _ in range(20)]
    for line in many:
        line.send(b"GET /health HTTP/1.1\r\nx: ")
    assert answers(server)
    assert drip(many[0], b"y") == b""
    for line in many[1:]:
        assert line.recv(100) == b""
        line.close()
    assert answers(server)


def test_a_connection_that_says_nothing_is_cut_off(server):
    with connected(server) as line:
        assert line.recv(100) == b""


def test_a_body_that_drips_is_refused_and_cut_off(server):
    with connected(server) as line:
        line.send(f"{HEAD}content-length: 100000\r\n\r\n".encode())
        assert answers(server)
        said = drip(line, b'{"prompt": "war"                   ')
        assert said.startswith(b"HTTP/1.1 408") and b'"code":"timeout"' in said


@pytest.mark.slow
def test_chunks_that_drip_too(server):
    with connected(server) as line:
        line.send(f"{HEAD}transfer-encoding: chunked\r\n\r\n".encode())
        assert drip(line, b"1\r\n \r\n").startswith(b"HTTP/1.1 408")


def test_who_sends_too_much_is_told_so_and_cut_off(server):
    """Content-Length says 10 GB, or says nothing: what comes is counted."""
    for length in ("content-length: 10000000000", "transfer-encoding: chunked"):
        with connected(server) as line:
            line.send(f"{HEAD}{length}\r\n\r\n".encode())
            piece = b" " * 65536 if "content" in length else b"10000\r\n" + b" " * 65536 + b"\r\n"
            sent = 0
            try:
                while sent < 2**30:
                    line.sendall(piece)
                    sent += 65536
                    line.setblocking(False)
                    try:
                        if line.recv(100, socket.MSG_PEEK):
                            break
                    except BlockingIOError:
                        pass
                    finally:
                        line.setblocking(True)
            except OSError:
                pass
            assert line.recv(100).startswith(b"HTTP/1.1 413") and sent < 16 * 2**20


def test_an_idle_connection_is_closed_and_a_busy_one_is_not(server):
    with connected(server) as line:
        for _ in range(2):
            line.send(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            said = b""
            while not said.endswith(b'{"status":"ok"}'):
                said += line.recv(4000)
            time.sleep(0.2)
        assert line.recv(100) == b""


def test_a_client_that_does_not_read_loses_its_slot(server):
    body = json.dumps(LONG).encode()
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect(("127.0.0.1", server.port))
        line.send(f"{HEAD}content-length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: server.number("tessera_slots_used") == 1)
        until(lambda: server.number("tessera_slots_used") == 0)
        assert server.number('tessera_texts_total{finish="length"}') < 10 and server.running.service.request_queue.occupied == 0


@pytest.mark.parametrize("sent", [
    b"\x16\x03\x01\x02\x00 tls?\r\n\r\n", b"GET / HTTP\r\n\r\n", b"G\xffT / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n"])  # fmt: skip
def test_what_is_no_http_is_refused(server, sent):
    with connected(server) as line:
        line.send(sent)
        said = line.recv(4000)
        assert said.startswith(b"HTTP/1.1 400") and b'"code":"invalid_http"' in said


def test_too_many_connections_are_turned_away(server):
    many = [connected(server) for _ in range(30)]
    with connected(server) as line:
        assert line.recv(4000).startswith(b"HTTP/1.1 503")
    for line in many:
        line.close()
    until(lambda: len(server.running._server.server_state.connections) == 0)
    assert answers(server)


def test_requests_one_behind_the_other_are_answered_in_turn(server):
    body = json.dumps({"prompt": "war", "max_tokens": 2}).encode()
    one = f"{HEAD}content-length: {len(body)}\r\n\r\n".encode() + body
    with connected(server) as line:
        line.send(one * 3)
        said = b""
        while said.count(b"HTTP/1.1 200") < 3:
            said += line.recv(65536)
        assert said.count(b'"finish_reason"') >= 2


LONG_TEXT = {"prompt": "war", "max_tokens": 90_000, "temperature": 0, "stream": True}


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
        lines = reading(server, LONG_TEXT, 5)
        assert lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["error"]["code"] == "shutting_down"
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()


def test_one_that_ends_in_time_ends_as_ever(small):
    with served(small, "--context", "100000", "--grace_seconds", "60") as server:
        lines = reading(server, LONG_TEXT | {"max_tokens": 100}, 5)
        assert lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["choices"][0]["finish_reason"] == "length"
        begun = time.monotonic()
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive() and time.monotonic() - begun < 30, "it waited for the grace though nothing was left"


def test_the_second_time_there_is_no_grace(small):
    with served(small, "--context", "100000", "--grace_seconds", "600") as server:
        threading.Timer(0.5, server.running.stop).start()
        lines = reading(server, LONG_TEXT, 5)
        assert json.loads(lines[-2][6:])["error"]["code"] == "shutting_down"


def test_health_is_503_while_texts_end_and_a_new_client_is_told_so(small):
    """A real stop: until the last text has ended, the server listens, on new connections, too. Then it is gone at once."""
    with served(small, "--context", "100000", "--grace_seconds", "60") as server, server.client() as client:
        with client.stream("POST", "/v1/completions", json=LONG_TEXT | {"max_tokens": 300}) as response:
            lines, seen = [], []
            for line in filter(None, response.iter_lines()):
                lines.append(line)
                if len(lines) == 5:
                    server.running.stop()
                if len(lines) in (6, 7):
                    with server.client() as other:
                        answers = [other.get("/health"), other.post("/v1/completions", json={"prompt": "war"}), other.head("/health")]
                    seen += [(answer.status_code, answer.headers["retry-after"]) for answer in answers]
        assert seen == [(503, "10")] * 6 and lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2][6:])["choices"][0]["finish_reason"] == "length"
        begun = time.monotonic()
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive() and time.monotonic() - begun < 30, "it waited for the grace though nothing was left"
        with pytest.raises(ConnectionRefusedError):
            connected(server)


def test_a_server_without_texts_ends_at_once(small):
    """Idle connections do not keep it, and the second of two signals that come together does no harm."""
    with served(small, "--grace_seconds", "600") as server, connected(server), server.client() as client:
        assert client.get("/health").status_code == 200
        server.running.stop()
        server.running.stop()
        begun = time.monotonic()
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive() and time.monotonic() - begun < 30


def test_an_error_of_the_engine_ends_the_server(small, monkeypatch):
    with pytest.raises(RuntimeError, match="broken"), served(small) as server:

        def broken():
            raise RuntimeError("broken")

        monkeypatch.setattr(server.running.engine.generator, "step", broken)
        answer = server.post("/v1/completions", prompt="war")
        assert answer.status_code in (500, 503)
        until(lambda: not server.thread.is_alive())
