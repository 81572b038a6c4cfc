"""HTTP as a hostile client or a confused proxy sends it: what is refused, what is answered, and that the connection is in a known state.

What is refused closes its connection with 400, so that nothing behind it is taken for a request (request smuggling).
"""

import pytest

pytest.importorskip("fastapi")

import contextlib
import functools
import json
import re
import socket

import h11
import pytest

from research.serving.connection import MOST_BLANKS, PARSED_BYTES, RECEIVED_BYTES, Connection, RequestParser
from tests.research.helpers.timing import growth
from tests.research.serving.helpers.servers import PATIENCE, served, until

BODY = json.dumps({"prompt": "war", "max_tokens": 1}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
LENGTH = b"content-length: %d\r\n" % len(BODY)
CHUNKED = b"transfer-encoding: chunked\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
HIDDEN = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"
"""Must never be answered when it lies in the body of another request."""
STATUS = re.compile(rb"HTTP/1\.1 [0-9]{3} ")
HEAD_BYTES = 4000


@pytest.fixture(scope="module")
def server(small):
    with served(small, "--head_bytes", str(HEAD_BYTES), "--idle_seconds", "2") as found:
        yield found


def said(server, sent: bytes, answers: int = 0) -> bytes:
    """What the server says to `sent`: until it closes the connection, or has begun so many answers and is silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as line:
        line.sendall(sent)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := line.recv(65536):
                found += piece
                if answers and len(STATUS.findall(found)) >= answers and found.endswith(b"}"):
                    break
        return found


def refusal(answer: bytes) -> str:
    """The message of a 400 that closes the connection, and is the only answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"connection: close" in head and len(STATUS.findall(answer)) == 1, answer
    error = json.loads(body)["error"]
    assert error["code"] == "invalid_http" and "→" in error["message"]
    return error["message"]


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        (LENGTH + CHUNKED, "both Transfer-Encoding and Content-Length"),
        (CHUNKED + LENGTH, "both Transfer-Encoding and Content-Length"),
        (b"transfer-encoding:\r\n chunked\r\n" + LENGTH, "both Transfer-Encoding and Content-Length"),
        (LENGTH + b"content-length: 0\r\n", "Invalid HTTP"),
        (b"content-length: 3, 5\r\n", "Invalid HTTP"),
        (b"content-length: 5\r\n 6\r\n", "Invalid HTTP"),
        (b"content-length : 5\r\n", "Invalid HTTP"),
        (b"content-length: +5\r\n", "Invalid HTTP"),
        (b"content-length: 0x5\r\n", "Invalid HTTP"),
        (b"content-length: " + b"9" * 21 + b"\r\n", "Invalid HTTP"),
        (CHUNKED + CHUNKED, "Invalid HTTP"),
        (b"transfer-encoding: chunked, identity\r\n", "Invalid HTTP"),
        (b"transfer-encoding: xchunked\r\n", "Invalid HTTP"),
        (b"transfer-encoding: \x0bchunked\r\n", "Invalid HTTP"),
        (b"host: other\r\n", "Invalid HTTP"),
        (b" folded: at the beginning\r\n: no name\r\n", "Invalid HTTP"),
        (b"x: \0\r\n", "Invalid HTTP"),
        (b"x:" + b" " * (MOST_BLANKS + 1) + b"y\r\n", f"more than {MOST_BLANKS} blanks in a row"),
        (b"x: " + b"y" * HEAD_BYTES + b"\r\n", f"have more than {HEAD_BYTES} bytes"),
        (b"x: y\r\n" * (HEAD_BYTES // 6), f"have more than {HEAD_BYTES} bytes"),
    ],
)
def test_a_request_whose_end_is_in_doubt_is_refused_and_the_connection_closed(server, headers, says):
    assert says in refusal(said(server, POST + headers + b"\r\n" + HIDDEN))


def test_http_1_0_has_no_chunks(server):
    assert "HTTP/1.0" in refusal(said(server, POST.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n0\r\n\r\n" + HIDDEN))


@pytest.mark.parametrize(
    "body",
    [
        b"5;" + b" " * (PARSED_BYTES + 1000) + b"\r\n",
        b"5 5\r\n",
        b"-5\r\n",
        b"5\r\n12345XX0\r\n\r\n",
        b"1" * 21 + b"\r\n",
        b"0\r\n x: y\r\n\r\n",
        b"0\r\nx: " + b"y" * (PARSED_BYTES + 1000) + b"\r\n\r\n",
    ],
)
def test_chunks_that_are_none(server, body):
    """The app has begun to read the body, so it may end it as an error of its own; the connection is closed and nothing else answered."""
    answer = said(server, POST + CHUNKED + b"\r\n" + body + HIDDEN)
    assert len(STATUS.findall(answer)) <= 1 and b'"object":"list"' not in answer and (not answer or b"HTTP/1.1 4" in answer), answer


@pytest.mark.parametrize(
    "framing", [LENGTH, LENGTH * 2, b"content-length:\r\n\t%d\r\n" % len(BODY), b"Content-Length:%d \t\r\n" % len(BODY)]
)
def test_one_length_however_written(server, framing):
    """Equal lengths count as one, and a folded line is unfolded, as RFC 9112 allows; what follows is the next request."""
    answer = said(server, POST + framing + b"\r\n" + BODY + HEALTH, answers=2)
    assert answer.count(b"HTTP/1.1 200") == 2 and answer.endswith(b'{"status":"ok"}')


def test_chunks_with_extensions_and_trailers(server):
    chunks = b"".join(b"%x;name=value\r\n%b\r\n" % (len(BODY[i : i + 7]), BODY[i : i + 7]) for i in range(0, len(BODY), 7))
    answer = said(server, POST + CHUNKED + b"\r\n" + chunks + b"0\r\nx: y\r\n\r\n" + HEALTH, answers=2)
    assert answer.count(b"HTTP/1.1 200") == 2 and answer.endswith(b'{"status":"ok"}')


def test_expect_100_continue(server):
    """A client that waits for leave to send its body gets it, or the refusal at once."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as line:
        line.sendall(POST + LENGTH + b"expect: 100-continue\r\n\r\n")
        assert line.recv(1000).startswith(b"HTTP/1.1 100")
        line.sendall(BODY)
        assert line.recv(65536).startswith(b"HTTP/1.1 200")
    refused = said(server, POST.replace(b"application/json", b"text/plain") + LENGTH + b"expect: 100-continue\r\n\r\n", answers=1)
    assert refused.startswith(b"HTTP/1.1 415") and len(STATUS.findall(refused)) == 1


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET http://localhost/health HTTP/1.1", 404),
        (b"GET http://localhost/v1/models HTTP/1.1", 404),
        (b"GET //health HTTP/1.1", 404),
        (b"GET /health/../v1/models HTTP/1.1", 404),
        (b"OPTIONS * HTTP/1.1", 404),
        (b"CONNECT localhost:80 HTTP/1.1", 404),
        (b"TRACE /health HTTP/1.1", 405),
        (b"HEAD /health HTTP/1.1", 200),
        (b"PRI /health HTTP/2.0", 405),
    ],
)
def test_targets_and_methods(server, line, status):
    """An absolute or rewritten target is another address, and so no way around the checks of an address."""
    answer = said(server, line + b"\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 %d" % status), answer


def test_an_upgrade_is_not_taken_up(server):
    answer = said(server, HEALTH[:-2] + b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: x\r\n\r\n", answers=1)
    assert answer.startswith(b"HTTP/1.1 200")


def test_a_client_that_closes_its_half_leaves_nothing_behind(server):
    """It has sent a whole request and no more; or half of one."""
    for sent in (POST + LENGTH + b"\r\n" + BODY, POST + LENGTH + b"\r\n" + BODY[:5], POST):
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as line:
            line.sendall(sent)
            line.shutdown(socket.SHUT_WR)
            while line.recv(65536):
                pass
    until(lambda: server.running.service.request_queue.occupied == 0 and server.number("tessera_slots_used") == 0)
    until(lambda: len(server.running._server.server_state.tasks) <= 1)


def test_a_body_in_chunks_of_one_byte_does_not_hold_up_others(server, monkeypatch):
    """A megabyte of them takes the event loop seconds in all, so it reads a little at a time, and other connections between."""
    turns, read = [], Connection.buffer_updated

    def counted(connection: Connection, nbytes: int) -> None:
        turns.append((connection, nbytes))
        read(connection, nbytes)

    monkeypatch.setattr(Connection, "buffer_updated", counted)
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as line, server.client() as client:
        line.setblocking(False)
        line.send(POST + CHUNKED + b"\r\n")
        chunks, sent = memoryview(b"1\r\n \r\n" * 40_000), 0
        while sent < len(chunks) or sum(nbytes for _, nbytes in turns) < len(chunks):  # until the last one is read
            with contextlib.suppress(BlockingIOError):
                sent += line.send(chunks[sent:]) if sent < len(chunks) else 0
            assert client.get("/health").status_code == 200
    long = max((connection for connection, _ in turns), key=lambda one: sum(nbytes for connection, nbytes in turns if connection is one))
    places = [i for i, (connection, _) in enumerate(turns) if connection is long]
    assert max(nbytes for _, nbytes in turns) <= RECEIVED_BYTES and len(places) > 3
    assert any(turns[i][0] is not long for i in range(places[0], places[-1])), "another connection had a turn while it was read"


def parse(sent: bytes) -> None:
    """Gives h11 the bytes as a connection does, until it refuses them."""
    parser = RequestParser(2**14)
    with contextlib.suppress(h11.RemoteProtocolError):
        for start in range(0, len(sent), PARSED_BYTES):
            parser.receive_data(sent[start : start + PARSED_BYTES])
            while parser.next_event() not in (h11.NEED_DATA, h11.PAUSED):
                pass


@pytest.mark.parametrize(
    "make",
    [
        lambda n: HEALTH[:-2] + b"x:" + b" " * n + b"\0\r\n\r\n",
        pytest.param(lambda n: HEALTH[:-2] + b"x:" + b"\t " * (n // 2) + b"\0\r\n\r\n", marks=pytest.mark.slow),
        pytest.param(lambda n: HEALTH[:-2] + b"x:" + b"a " * (n // 2) + b"\0\r\n\r\n", marks=pytest.mark.slow),
        pytest.param(lambda n: HEALTH[:-2] + (b"x:" + b" " * 250 + b"\0\r\n") * (n // 255) + b"\r\n", marks=pytest.mark.slow),
        pytest.param(lambda n: HEALTH[:-2] + b"a:b\r\n" * (n // 5) + b"\r\n", marks=pytest.mark.slow),
        pytest.param(lambda n: HEALTH[:-2] + b"x: b\r\n" + b" b\r\n" * (n // 4) + b"\r\n", marks=pytest.mark.slow),
        pytest.param(lambda n: HEALTH[:-2] + b"content-length: " + b"5," * (n // 2) + b"5\r\n\r\n", marks=pytest.mark.slow),
        lambda n: POST + CHUNKED + b"\r\n5;" + b" " * n + b"\n\r\n",
        pytest.param(lambda n: POST + CHUNKED + b"\r\n0\r\nx:" + b" " * n + b"\0\r\n\r\n", marks=pytest.mark.slow),
        pytest.param(lambda n: POST + CHUNKED + b"\r\n" + b"1\r\n \r\n" * (n // 6), marks=pytest.mark.slow),
        pytest.param(lambda n: b"GET /" + b"%41" * (n // 3) + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", marks=pytest.mark.slow),
    ],
)
def test_the_time_to_parse_is_in_proportion_to_the_bytes(make):
    assert growth(lambda n: functools.partial(parse, make(n)), 3500) < 10
