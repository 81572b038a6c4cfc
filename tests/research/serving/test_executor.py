"""Threads of the server: each kind of work has its own, with a bound, so that slow requests of one kind hold up no others.

The slow tests do it with a whole server: chat templates without end beside completions, a tokenizer that panics, fuzzed bodies.
"""

import pytest

pytest.importorskip("fastapi")

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from benchmarks import serve_hostile
from research.config import serialization
from research.serving.errors import ApiError
from research.serving.executor import BoundedExecutor
from research.serving.responses import to_json
from research.tracking.own_runs import mark_as_own
from tests.models.helpers.build import ROTARY
from tests.research.helpers import untrained
from tests.research.serving.helpers.servers import PATIENCE, number, served, typed, until

ASKED = {"prompt": "war", "max_tokens": 2, "temperature": 0}


def test_more_calls_than_the_bound_are_refused_and_their_places_come_back():
    async def scenario() -> None:
        executor, go = BoundedExecutor("the work", threads=1, waiting=1, retry_after=3), threading.Event()
        running, waiting = asyncio.ensure_future(executor.run(go.wait, PATIENCE)), asyncio.ensure_future(executor.run(len, "four"))
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as refused:
            await executor.run(len, "")
        assert refused.value.status == 429 and refused.value.headers == {"retry-after": "3"}
        assert refused.value.message == "2 requests are in the work or wait for it, 2 is the most → ask again in 3 s"
        go.set()
        assert await running and await waiting == 4
        with pytest.raises(ZeroDivisionError):
            await executor.run(divmod, 1, 0)
        assert await executor.run(len, "one") == 3
        executor.close()

    asyncio.run(scenario())


def test_a_call_that_is_given_up_never_runs_if_it_waits_and_keeps_its_place_if_it_runs():
    async def scenario() -> None:
        executor, go, ran = BoundedExecutor("the work", threads=1, waiting=1, retry_after=1), threading.Event(), []
        running, waiting = asyncio.ensure_future(executor.run(go.wait, PATIENCE)), asyncio.ensure_future(executor.run(ran.append, 1))
        await asyncio.sleep(0)
        waiting.cancel()
        running.cancel()
        await asyncio.gather(waiting, running, return_exceptions=True)
        last = asyncio.ensure_future(executor.run(len, "three"))  # in the place of the one that waited
        await asyncio.sleep(0)
        with pytest.raises(ApiError):
            await executor.run(len, "")
        go.set()
        assert await last == 5 and ran == []
        executor.close()

    asyncio.run(scenario())


def test_a_text_of_too_many_characters_is_refused_with_both_numbers(small):
    with served(small, "--characters", "50") as server:
        for path, field, value in (
            ("/v1/completions", "prompt", "a" * 51),
            ("/v1/completions", "prompt", ["a" * 26, "b" * 25]),
            ("/v1/chat/completions", "messages", [{"role": "user", "content": "a" * 47}]),  # the role counts, too
        ):
            error = server.post(path, **{field: value, "truncation": "auto"}).json()["error"]
            assert error["message"] == f"{field} has 51 characters, more than 50 → send less, or start the server with --characters"
            assert (error["param"], error["code"]) == (field, "too_many_characters")
        assert server.post("/v1/completions", prompt="a" * 50, max_tokens=1).status_code == 200


def test_a_response_is_json_however_it_is_put_together(small):
    """Whole responses are written choice by choice. The keys are those of a stream's events, and the bytes are those of to_json."""
    with served(small) as server:
        for path, asked in (
            ("/v1/completions", {"prompt": ["war", "½"], "n": 2, "logprobs": 2, "echo": False}),
            ("/v1/completions", {"prompt": ["war", "½"], "n": 2, "echo": True}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "½"}], "n": 2, "logprobs": True, "top_logprobs": 2}),
        ):
            answer = server.post(path, **asked, max_tokens=3, temperature=0)
            value = answer.json()
            assert (
                answer.content == to_json(value)
                and list(value)[-1] == "choices"
                and len(value["choices"]) == 2 * len(asked.get("prompt", "1"))
            )
            if asked.get("echo"):
                assert [choice["text"][:1] for choice in value["choices"]] == ["w", "w", "½", "½"]


@pytest.mark.slow
def test_completions_do_not_wait_for_templates_that_do_not_end(small, tmp_path):
    """Twelve conversations of a second each, one after the other; six have a place. While they wait, completions are answered."""
    (tmp_path / "chat.jinja").write_text(serve_hostile.TEMPLATE)
    words = ["--chat_template", str(tmp_path / "chat.jinja"), "--template_seconds", "1", "--template_queue", "4"]
    with served(small, *words) as server:
        statuses: list[int] = []  # in the order of the answers; those of completions are 200

        def chat() -> None:
            answer = server.post("/v1/chat/completions", messages=[{"role": "user", "content": serve_hostile.ENDLESS}], max_tokens=2)
            assert answer.status_code != 429 or answer.headers["retry-after"] == "1"
            statuses.append(answer.status_code)

        threads = [threading.Thread(target=chat) for _ in range(12)]
        for thread in threads:
            thread.start()
        until(lambda: statuses.count(429) == 6)
        while statuses.count(400) < 6:
            assert server.post("/v1/completions", **ASKED).status_code == 200
            assert server.post("/health").status_code == 405  # any answer
            statuses.append(200)
        for thread in threads:
            thread.join()
        assert sorted(status for status in statuses if status != 200) == [400] * 6 + [429] * 6
        # a completion that waited for a template would be one for each; there are more before each but the first, which had begun before
        before = [statuses[: i + 1].count(200) for i, status in enumerate(statuses) if status == 400]
        assert all(later - earlier > 1 for earlier, later in pairwise(before)), before
        chat = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "war"}], max_tokens=2)
        assert chat.status_code == 200


@pytest.mark.slow
def test_a_client_that_leaves_takes_its_conversation_out_of_the_queue(small, tmp_path):
    """Six take all places and leave: those that wait make room at once, so that four others are not refused with 429."""
    (tmp_path / "chat.jinja").write_text(serve_hostile.TEMPLATE)
    words = ["--chat_template", str(tmp_path / "chat.jinja"), "--template_seconds", "3", "--template_queue", "4"]
    with served(small, *words) as server, server.client() as client:

        def leave() -> None:
            endless = {"messages": [{"role": "user", "content": serve_hostile.ENDLESS}]}
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", json=endless, timeout=0.3)

        def stay() -> int:
            answer = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "war"}], max_tokens=2)
            return answer.status_code

        with ThreadPoolExecutor(6) as clients:
            for left in [clients.submit(leave) for _ in range(6)]:
                left.result()
            assert [stays.result() for stays in [clients.submit(stay) for _ in range(4)]] == [200] * 4


@pytest.mark.slow
def test_a_tokenizer_that_panics_is_a_refusal(tmp_path):
    """Of a prompt, of a message, and of what was generated; the server answers the next request."""
    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "z": 1, "x": 2, "a": 3}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split(Regex("(z+)+x"), "isolated"), decoders.Fuse()
    backend.add_special_tokens(["<s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    folder = untrained.make(tmp_path, **ROTARY | dict(seq_length=128, num_kv_heads=2))
    experiment = serialization.load(folder.config)
    data = experiment.data.model_copy(update={"tokenizer": str(tmp_path / "tokenizer.json")})
    serialization.save(experiment.model_copy(update={"data": data}), folder.config)
    mark_as_own(folder)
    with served(folder) as server:
        for path, asked in (
            ("/v1/completions", {"prompt": "z" * 40}),
            ("/v1/completions", {"prompt": ["a", "z" * 40]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "z" * 40}]}),
        ):
            answer = server.post(path, **asked, max_tokens=2)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "tokenizer_error") and "limit" in error["message"], answer.text
            assert error["message"].startswith(error["param"]) and "→" in error["message"]
        assert server.post("/v1/completions", prompt="a", max_tokens=2).status_code == 200


@pytest.mark.slow
def test_fuzzed_bodies_change_nothing(small, tmp_path):
    """Two thousand, of up to twice the bound, in a process of its own. The seed is in the message of a failure."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    (tmp_path / "chat.jinja").write_text(serve_hostile.TEMPLATE)
    with typed(str(small.path), "--chat_template", str(tmp_path / "chat.jinja")) as (process, url, _):
        threading.Thread(target=process.stdout.read, daemon=True).start()  # its log, or the pipe would be full
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            before, resident = client.post("/v1/completions", json=ASKED).json()["choices"], 0.0
            for i in range(2000):
                path, body = serve_hostile.fuzzed(chance, 2**20)
                answer = client.post(path, content=body, headers=serve_hostile.JSON)
                try:
                    serve_hostile.check_answer(answer)
                except ValueError as error:
                    pytest.fail(f"seed {seed}, body {i}, {path} {body[:200]!r}: {error}")
                if i == 500:
                    resident = number(client.get("/metrics").text, "process_resident_memory_bytes")
            grown = number(client.get("/metrics").text, "process_resident_memory_bytes") - resident
            assert client.post("/v1/completions", json=ASKED).json()["choices"] == before
            assert process.poll() is None and resident > 0 and grown < 64 * 2**20, (seed, grown)
