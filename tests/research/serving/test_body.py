"""Bodies: strict JSON within bounds, counted as they come; and hundreds of hostile ones, none of which is an error of the server's."""

import asyncio
import json
import random

import httpx
import pytest

pytest.importorskip("fastapi")

from research.serving import body
from research.serving.limits import Limits
from research.serving.refusal import Refusal
from tests.research.serving.hostile import bodies
from tests.research.serving.servers import number, served, typed

LIMITS = Limits(body_bytes=1000, body_seconds=0.2)


@pytest.mark.parametrize(
    ("raw", "says", "param"),
    [
        (b"", "is not JSON", None),
        (b"{", "is not JSON", None),
        (b'"text"', "no object", None),
        (b"[]", "no object", None),
        (b'{"a": NaN}', "contains NaN", None),
        (b'{"a": -Infinity}', "contains -Infinity", None),
        (b'{"a": 1e999}', "too large", None),
        (b'{"a": ' + b"9" * 5000 + b"}", "of 5000 digits", None),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "c is there twice", "c"),
        (b"[" * 1000 + b"]" * 1000, "more than 16 brackets deep", None),
        (b'{"a":' * 1000 + b"1" + b"}" * 1000, "more than 16 brackets deep", None),
        (b"\xff\xfe{}", "not UTF-8", None),
        ('{"a": "½"}'.encode("utf-16"), "not UTF-8", None),
        ('{"a": "é"}'.encode("latin-1"), "not UTF-8 at byte 7", None),
        (b"\xef\xbb\xbf{}", "is not JSON", None),
        (json.dumps(dict.fromkeys(map(str, range(600)))).encode(), "more than 512 fields", None),
    ],
)
def test_what_is_no_table_is_refused(raw, says, param):
    with pytest.raises(Refusal) as refused:
        body.parse(raw, 16)
    assert says in refused.value.message and refused.value.status == 400 and refused.value.param == param


FIFTEEN = [[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]


@pytest.mark.parametrize("value", [{}, {"a": '[[[[[[[[[[[[[[[[[[[[\\"[[[['}, {"a": FIFTEEN, "b": 1.5, "c": None, "d": -(2**63)}])
def test_what_json_reads_is_read(value):
    assert body.parse(json.dumps(value).encode(), 16) == value


def read(chunks, kind="application/json; charset=utf-8", pause=0.0):
    async def stream():
        for chunk in chunks:
            await asyncio.sleep(pause)
            yield chunk

    return asyncio.run(body.read({"content-type": kind, "content-length": "3"}, stream(), LIMITS))


def test_bytes_are_counted_as_they_come_and_content_length_is_not_believed():
    assert read([b'{"a"', b": 1}"]) == {"a": 1}
    drawn = []

    def endless():
        while True:
            drawn.append(1)
            yield b" " * 100

    with pytest.raises(Refusal) as refused:
        read(endless())
    assert refused.value.status == 413 and len(drawn) == 11


def test_time_and_type():
    with pytest.raises(Refusal) as refused:
        read([b" "] * 100, pause=0.05)
    assert refused.value.status == 408
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"):
        with pytest.raises(Refusal) as refused:
            read([b"{}"], kind)
        assert refused.value.status == 415


def hostility(client: httpx.Client, count: int, seed: int) -> None:
    """Sends as many; each is refused in OpenAI's shape, with the field's name where it is about a field."""
    for case in bodies(random.Random(seed), count):
        answer = client.post(case.path, content=case.content, headers=case.headers)
        assert 400 <= answer.status_code < 500, (case, answer.text)
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and "→" in error["message"], (case, error)
        assert case.param is None or (error["param"] or "").startswith(case.param), (case, error)
        assert case.param is None or error["message"].startswith(error["param"]), (case, error)


ASKED = {"prompt": "the people", "max_tokens": 8, "temperature": 0}


def test_hundreds_of_hostile_bodies_change_nothing(small):
    with served(small) as server, server.client() as client:
        before = client.post("/v1/completions", json=ASKED).json()["choices"]
        hostility(client, 300, seed=1)
        assert client.post("/v1/completions", json=ASKED).json()["choices"] == before
        assert server.running.service.desk.taken == 0


@pytest.mark.slow
def test_a_thousand_hostile_bodies_leave_memory_as_it_was(small):
    """In a process of its own, whose resident memory is told by itself: it is the first hundred's, within 64 MB."""
    with typed(str(small.path)) as (process, url, _), httpx.Client(base_url=url, timeout=60) as client:
        before = client.post("/v1/completions", json=ASKED).json()["choices"]
        hostility(client, 100, seed=2)
        resident = number(client.get("/metrics").text, "process_resident_memory_bytes")
        hostility(client, 900, seed=3)
        grown = number(client.get("/metrics").text, "process_resident_memory_bytes") - resident
        assert client.post("/v1/completions", json=ASKED).json()["choices"] == before
        assert process.poll() is None and resident > 0 and grown < 64 * 2**20, grown
