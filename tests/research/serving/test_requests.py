"""Request bodies: strict JSON within limits; hundreds of hostile bodies, none of which causes a server error; and the fields.

A field whose value asks for nothing is accepted; a field that is not supported is rejected by its name.
"""

import pytest

pytest.importorskip("fastapi")

import asyncio
import json
import random

import httpx
import pytest

from research.serving import requests
from research.serving.errors import ApiError
from research.serving.limits import Limits
from research.serving.requests import ChatRequest, CompletionRequest, validate, validate_message
from tests.research.serving.helpers.hostile import bodies
from tests.research.serving.helpers.servers import number, served, typed

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
    with pytest.raises(ApiError) as refused:
        requests.parse_json(raw, 16)
    assert says in refused.value.message and refused.value.status == 400 and refused.value.param == param


FIFTEEN = [[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]


@pytest.mark.parametrize("value", [{}, {"a": '[[[[[[[[[[[[[[[[[[[[\\"[[[['}, {"a": FIFTEEN, "b": 1.5, "c": None, "d": -(2**63)}])
def test_what_json_reads_is_read(value):
    assert requests.parse_json(json.dumps(value).encode(), 16) == value


def read(chunks, kind="application/json; charset=utf-8", pause=0.0):
    async def stream():
        for chunk in chunks:
            await asyncio.sleep(pause)
            yield chunk

    return requests.parse_json(asyncio.run(requests.read_body({"content-type": kind, "content-length": "3"}, stream(), LIMITS)), 16)


def test_bytes_are_counted_as_they_come_and_content_length_is_not_believed():
    assert read([b'{"a"', b": 1}"]) == {"a": 1}
    drawn = []

    def endless():
        while True:
            drawn.append(1)
            yield b" " * 100

    with pytest.raises(ApiError) as refused:
        read(endless())
    assert refused.value.status == 413 and len(drawn) == 11


def test_time_and_type():
    with pytest.raises(ApiError) as refused:
        read([b" "] * 100, pause=0.05)
    assert refused.value.status == 408
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"):
        with pytest.raises(ApiError) as refused:
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
        assert " should " not in error["message"] and "it " not in error["message"].split("→")[0].split(), (case, error)


ASKED = {"prompt": "the people", "max_tokens": 8, "temperature": 0}


def test_hundreds_of_hostile_bodies_change_nothing(small):
    with served(small) as server, server.client() as client:
        before = client.post("/v1/completions", json=ASKED).json()["choices"]
        hostility(client, 300, seed=1)
        assert client.post("/v1/completions", json=ASKED).json()["choices"] == before
        assert server.running.service.request_queue.occupied == 0


@pytest.mark.slow
def test_a_thousand_hostile_bodies_leave_memory_as_it_was(small):
    """In a process of its own, whose resident memory is told by itself: it is the first hundred's, within 64 MB."""
    with typed(str(small.path)) as (process, url, _), httpx.Client(base_url=url, timeout=60) as client:
        before = client.post("/v1/completions", json=ASKED).json()["choices"]
        hostility(client, 100, seed=2)
        told = client.get("/metrics").text
        resident = number(told, "process_resident_memory_bytes")
        assert 1e8 < number(told, "tessera_memory_before_model_bytes") < resident, "the libraries are most of it"
        hostility(client, 900, seed=3)
        grown = number(client.get("/metrics").text, "process_resident_memory_bytes") - resident
        assert client.post("/v1/completions", json=ASKED).json()["choices"] == before
        assert process.poll() is None and resident > 0 and grown < 64 * 2**20, grown


SAID = {"messages": [{"role": "user", "content": "hi"}]}
NEUTRAL_CHAT = {
    "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "logit_bias": {}, "presence_penalty": 0,
    "frequency_penalty": 0.0, "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "response_format": {"type": "text"},
    "modalities": ["text"], "logprobs": False, "top_logprobs": None, "stop": None, "stream_options": None, "seed": None, "n": None,
    "max_tokens": None, "functions": None, "reasoning_effort": None, "prompt_cache_key": "k", "safety_identifier": "s",
}  # fmt: skip


def test_what_clients_send_without_meaning_anything_is_accepted():
    asked = validate(ChatRequest, SAID | NEUTRAL_CHAT)
    assert asked == validate(ChatRequest, SAID) and asked.temperature == 1 and asked.n == 1 and not asked.stream
    for name, value in NEUTRAL_CHAT.items():
        assert validate(ChatRequest, SAID | {name: value}) == asked, name
    assert validate(CompletionRequest, {"prompt": "x", "best_of": 1, "suffix": "", "user": "me"}) == validate(
        CompletionRequest, {"prompt": "x"}
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("tools", [{"type": "function"}]), ("tool_choice", "required"), ("logit_bias", {"5": 1}), ("presence_penalty", 0.5),
     ("presence_penalty", False), ("frequency_penalty", -1), ("response_format", {"type": "json_schema"}), ("modalities", ["audio"]),
     ("functions", [{}]), ("audio", {}), ("prediction", {}), ("reasoning_effort", "low"), ("web_search_options", {})],
)  # fmt: skip
def test_what_is_not_there_is_refused_by_its_name(name, value):
    with pytest.raises(ApiError) as refused:
        validate(ChatRequest, SAID | {name: value})
    assert refused.value.param == name and refused.value.code == "unsupported_parameter" and "→" in refused.value.message


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        ({"temprature": 1}, "temprature", "did you mean temperature?"),
        ({"zzz": 1}, "zzz", "leave it out"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream = true"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "include_usage?"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs = true"),
        ({"temperature": 2.5}, "temperature", "= 2.5 does not work"),
        ({"temperature": 1e-9}, "temperature", "greedy"),
        ({"top_p": 0}, "top_p", "= 0 does not work → send a number of more than 0 and at most 1"),
        ({"ignore_eos": True}, "ignore_eos", "is not known → leave it out"),
        ({"stop": ""}, "stop", 'stop = "" does not work → send a string that is not empty, or a list of such strings'),
        ({"stop": ["x", ""]}, "stop", 'stop = ["x", ""] does not work → send a string that is not empty'),
        ({"max_tokens": "5"}, "max_tokens", 'max_tokens = "5" does not work → send a whole number of at least 1'),
        ({"n": True}, "n", "n = true does not work → send a whole number of at least 1"),
        ({"stream_options": "x"}, "stream_options", 'send an object such as {"include_usage": true}'),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "= 1 does not work → send true or"),
        ({"messages": []}, "messages", 'messages = [] does not work → send a list such as [{"role": "user", "content": "…"}]'),
        ({"truncation": "on"}, "truncation", 'truncation = "on" does not work → send "disabled" or "auto"'),
        ({"seed": 2**63}, "seed", f"at most {2**63 - 1}"),
        ({"model": ["x" * 100]}, "model", "model does not work → send a string"),
    ],
)
def test_the_sentence_names_the_field_and_the_way_out(asked, param, says):
    with pytest.raises(ApiError) as refused:
        validate(ChatRequest, SAID | asked)
    assert refused.value.param == param and refused.value.message.startswith(param) and says in refused.value.message


def test_stop_is_one_or_several():
    assert validate(ChatRequest, SAID | {"stop": "x"}).stop == ["x"] and validate(ChatRequest, SAID | {"stop": ["x", "y"]}).stop == [
        "x",
        "y",
    ]


def test_messages():
    assert (
        validate_message({"role": "assistant", "content": "x", "tool_calls": None, "refusal": None, "annotations": []}, "m").content == "x"
    )
    roles = '"system", "developer", "user" or "assistant"'
    for wrong, param, says in (
        ({"role": "tool", "content": "x"}, "m.role", f'm.role = "tool" does not work → send {roles}'),
        ({"role": "user"}, "m.content", 'm.content is missing → send a string, or a list of {"type": "text", "text": "…"}'),
        ({"content": "x"}, "m.role", f"m.role is missing → send {roles}"),
        ({"role": "user", "content": "x", "name": "x" * 300}, "m.name", "m.name does not work → send a string of at most 256 characters"),
    ):
        with pytest.raises(ApiError) as refused:
            validate_message(wrong, "m")
        assert (refused.value.param, refused.value.message) == (param, says)
