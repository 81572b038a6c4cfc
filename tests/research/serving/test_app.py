"""The server as OpenAI's client sees it: the same text as without a server, streamed or whole, alone or with other clients."""

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

import httpx

from models.inference.sampling_params import SamplingParams
from parallel.grid import Grid
from research.config import serialization
from research.data.run_tokenizer import load_tokenizer
from research.generation.generator import TextGenerator
from research.generation.restore import DecoderSpec
from research.generation.settings import GenerationSettings, text_seed
from tests.research.serving.helpers.servers import served, until

WORDS = ("the people of the union", "war", "peace and jobs", "health", "½ of them", "the", "", "budget. in war: the people")

LONG = {"prompt": "war", "max_tokens": 90_000, "temperature": 0}
"""A text that does not end by itself within a test: greedy, it repeats itself."""


@pytest.fixture(scope="module")
def server(small):
    with served(small, "--slots", "4", "--queue", "100") as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def alone(small):
    """A writer without a server: (prompt, ask) -> its Text."""
    experiment = serialization.load(small.config)
    plan = DecoderSpec(small.path, small.checkpoints / "step_000003", slots=1, context=128)
    writer = TextGenerator(plan.on(Grid()), load_tokenizer(experiment.data, Path("/")), experiment.model, 128)

    def write(prompt, ask):
        text = writer.submit(prompt, ask)
        while writer:
            writer.step()
        return text

    return write


def test_a_completion_is_what_is_written_without_a_server(client, alone):
    found = client.completions.create(model=client.models.list().data[0].id, prompt="the people", max_tokens=12, temperature=0, logprobs=2)
    text = alone("the people", GenerationSettings(12, logprobs=2))
    assert found.choices[0].text == text.text and found.choices[0].finish_reason == "length"
    assert found.choices[0].logprobs.token_logprobs == pytest.approx([own for own, _ in text.generation.logprobs], abs=1e-5)
    assert len(found.choices[0].logprobs.top_logprobs[0]) == 2 and found.choices[0].logprobs.text_offset[0] == 0
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(text.generation.request.prompt), 12)


def test_a_seed_decides_every_text(client, alone):
    asked = dict(model=None, prompt=["war", "the people"], n=2, max_tokens=10, temperature=0.8, top_p=0.9, seed=7, extra_body={"top_k": 50})
    choices = client.completions.create(**asked).choices
    assert [choice.index for choice in choices] == [0, 1, 2, 3] and len({choice.text for choice in choices}) == 4
    for i, choice in enumerate(choices):
        ask = GenerationSettings(10, SamplingParams(0.8, 50, 0.9), text_seed(7, i // 2, i % 2))
        assert choice.text == alone(asked["prompt"][i // 2], ask).text
    assert client.completions.create(**asked | {"seed": 8}).choices[0].text != choices[0].text


def test_without_a_seed_texts_differ(client):
    asked = dict(model=None, prompt="war", max_tokens=16)
    assert client.completions.create(**asked).choices[0].text != client.completions.create(**asked).choices[0].text


def test_a_stream_is_the_whole_in_pieces(client):
    asked = dict(model=None, prompt="the people", max_tokens=20, seed=3, n=2, logprobs=1)
    whole = client.completions.create(**asked)
    texts, tokens, finish = ["", ""], [[], []], [None, None]
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            finish[choice.index] = choice.finish_reason or finish[choice.index]
        usage = chunk.usage
    assert texts == [choice.text for choice in whole.choices] and finish == [choice.finish_reason for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices] and usage == whole.usage


def test_tokens_are_prompts_too_and_a_prompt_is_echoed(client, server):
    words = server.running.service.tokenizer
    asked = dict(model=None, max_tokens=5, temperature=0)
    text = client.completions.create(prompt="the people", **asked).choices[0].text
    assert client.completions.create(prompt=words.encode("the people"), **asked).choices[0].text == text
    both = client.completions.create(prompt=[words.encode("the people"), words.encode("war")], **asked).choices
    assert both[0].text == text
    assert client.completions.create(prompt="the people", echo=True, **asked).choices[0].text == "the people" + text
    pieces = client.completions.create(prompt="the people", echo=True, stream=True, **asked)
    assert "".join(chunk.choices[0].text for chunk in pieces) == "the people" + text


def test_a_stop_string_ends_a_text_and_its_tokens(client):
    asked = dict(model=None, prompt="the people", max_tokens=20, seed=3, logprobs=0)
    whole = client.completions.create(**asked).choices[0]
    starts = whole.logprobs.text_offset
    ways = [(k, whole.text[starts[k] : starts[k + 2]]) for k in range(4, 15)]
    k, stop = next((k, stop) for k, stop in ways if len(stop) > 2 and whole.text.index(stop) == starts[k] < starts[k + 1])
    found = client.completions.create(**asked, stop=[stop, "never"])
    assert found.choices[0].text == whole.text[: starts[k]] and found.choices[0].finish_reason == "stop"
    assert found.choices[0].logprobs.text_offset == [start for start in starts if start < starts[k]]
    assert k + 2 <= found.usage.completion_tokens < 20
    pieces = list(client.completions.create(**asked, stop=[stop, "never"], stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.text[: starts[k]]
    assert sum((piece.choices[0].logprobs.text_offset for piece in pieces), []) == found.choices[0].logprobs.text_offset


def test_a_chat_without_a_template_is_plain_text(client, alone):
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "war?"}, {"role": "assistant", "content": "no"}]
    turns.append({"role": "user", "content": [{"type": "text", "text": "pea"}, {"type": "text", "text": "ce?"}]})
    asked = dict(model=None, messages=turns, temperature=0, max_tokens=9)
    text = alone("Be kind.\nUser: war?\nAssistant: no\nUser: peace?\nAssistant:", GenerationSettings(9)).text
    found = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert found.choices[0].message.content == text
    content = found.choices[0].logprobs.content
    assert len(content) == found.usage.completion_tokens == 9 and all(len(token.top_logprobs) == 2 for token in content)
    assert bytes(byte for token in content for byte in token.bytes).decode(errors="replace").startswith(text)
    pieces = client.chat.completions.create(**asked, stream=True)
    deltas = [chunk.choices[0] for chunk in pieces]
    assert deltas[0].delta.role == "assistant" and "".join(each.delta.content or "" for each in deltas) == text
    assert deltas[-1].finish_reason == "length"


def test_64_clients_at_once_get_what_one_alone_gets(client, server):
    """Greedy or drawn with a seed, in four slots."""
    kinds = [{"temperature": 0}, {"temperature": 0.9, "seed": 5}]
    asks = [{"model": None, "prompt": word, "max_tokens": 10} | kind for word in WORDS for kind in kinds]
    single = [client.completions.create(**ask).choices[0].text for ask in asks]

    async def everybody():
        several = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        return [answer.choices[0].text for answer in await asyncio.gather(*(several.completions.create(**ask) for ask in asks * 4))]

    assert asyncio.run(everybody()) == single * 4
    assert server.number("tessera_slots_used") == 0


def test_models_health_metrics(client, server):
    card = client.models.retrieve(client.models.list().data[0].id)
    assert card.id == server.running.service.name and card.context == 128
    with pytest.raises(openai.NotFoundError, match="is not here → use small-"):
        client.models.retrieve("gpt-5")
    with server.client() as plain:
        assert plain.get("/health").json() == {"status": "ok"}
        metrics = plain.get("/metrics")
        assert "tessera_tokens_total" in metrics.text and "process_resident_memory_bytes" in metrics.text
        page = plain.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"] and page.headers["x-content-type-options"] == "nosniff"


def test_head_and_addresses_as_http_says(server):
    """HEAD is GET without a body; an address that does not take a method says which it takes; an empty model name is the list."""
    with server.client() as plain:
        for path in ("/", "/page.css", "/page.js", "/page.json", "/health", "/v1/models", "/v1/models/", "/metrics"):
            head, get = plain.head(path), plain.get(path)
            assert (head.status_code, head.content) == (get.status_code, b"") == (200, b""), path
            assert path == "/metrics" or int(head.headers["content-length"]) == len(get.content)
            assert head.headers["content-type"] == get.headers["content-type"]
        assert plain.get("/v1/models/").json() == plain.get("/v1/models").json()
        for method, path, allowed in (
            ("POST", "/health", "GET, HEAD"),
            ("DELETE", "/v1/models", "GET, HEAD"),
            ("HEAD", "/v1/completions", "POST"),
            ("GET", "/v1/completions", "POST"),
            ("OPTIONS", "/v1/chat/completions", "POST"),
        ):
            refused = plain.request(method, path)
            assert (refused.status_code, refused.headers["allow"]) == (405, allowed), path
        error = plain.get("/v1/completions").json()["error"]
        assert error["message"] == "/v1/completions does not take the method GET → use POST" and error["code"] == "method_not_allowed"
        assert plain.get("/v1/nothing").json()["error"]["code"] == "not_found" and plain.head("/v1/nothing").status_code == 404
        page = plain.get("/page.json").json()
    assert page["prompts"] == ["the people of the union — ½ of them,"] and not page["has_chat_template"] and page["model"]["context"] == 128


def test_a_conversation_longer_than_the_context(client, server):
    """An error, unless the request asks to leave out the oldest turns: then what is left is answered as if it had been sent alone."""
    turns = [{"role": "system", "content": "Be kind."}]
    for i in range(9):
        turns += [{"role": "user", "content": f"war {i} " * 5}, {"role": "assistant", "content": "peace " * 5}]
    turns.append({"role": "user", "content": "jobs?"})
    asked = dict(model=None, messages=turns, temperature=0, max_tokens=20)
    with pytest.raises(openai.BadRequestError, match="does not slide") as refused:
        client.chat.completions.create(**asked)
    assert refused.value.code == "context_length_exceeded"
    auto = {"truncation": "auto"}
    found = client.chat.completions.create(**asked, extra_body=auto)
    left_out = found.messages_left_out
    assert 0 < left_out < 18 and left_out % 2 == 0
    rest = turns[:1] + turns[1 + left_out :]
    alone = client.chat.completions.create(**asked | {"messages": rest})
    assert (found.choices[0].message.content, found.usage) == (alone.choices[0].message.content, alone.usage)
    assert found.usage.total_tokens <= 128
    one_more = turns[:1] + turns[1 + left_out - 2 :]
    template = server.running.service.chat_template
    assert len(template.ids(rest)) + 20 <= 128 < len(template.ids(one_more)) + 20
    stream = client.chat.completions.create(**asked, stream=True, extra_body=auto)
    assert {chunk.messages_left_out for chunk in stream} == {left_out}


def test_an_answer_is_bounded_by_what_is_left(client):
    """With truncation, more tokens than the context has are no error; half of the context at least is left to a conversation."""
    asked = dict(model=None, temperature=0, max_tokens=5000, extra_body={"truncation": "auto"})
    found = client.chat.completions.create(messages=[{"role": "user", "content": "war and peace " * 5}], **asked)
    assert found.usage.total_tokens == 128 and found.messages_left_out == 0
    with pytest.raises(openai.BadRequestError, match="shorten the prompt"):
        client.chat.completions.create(messages=[{"role": "user", "content": "war and peace " * 200}], **asked)


def test_a_text_longer_than_the_context(client, server):
    """Without truncation an error; with it the model reads the last tokens, and the response says how many it did not."""
    ids = server.running.service.tokenizer.encode("the people of the union, in peace and in war: jobs, health. " * 9)
    asked = dict(model=None, temperature=0, max_tokens=28)
    for prompt in (ids, server.running.service.tokenizer.decode(ids)):
        with pytest.raises(openai.BadRequestError, match="context"):
            client.completions.create(prompt=prompt, **asked)
        found = client.completions.create(prompt=prompt, **asked, extra_body={"truncation": "auto"})
        alone = client.completions.create(prompt=ids[-100:], **asked)
        assert (found.choices[0].text, found.tokens_left_out) == (alone.choices[0].text, len(ids) - 100)
        assert (found.usage.prompt_tokens, found.usage.total_tokens) == (100, 128)
    assert not hasattr(alone, "tokens_left_out")


def test_a_client_that_leaves_frees_its_slot(small):
    """A stream that is closed, and a whole answer that is not waited for."""
    with served(small, "--slots", "1", "--context", "100000") as lone, lone.client() as client:
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()  # closes the connection once nobody holds it
            next(lines)
            assert lone.number("tessera_slots_used") == 1
        until(lambda: lone.number('tessera_texts_total{finish="cancelled"}') == 1)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=LONG, timeout=0.3)
        until(lambda: lone.number('tessera_texts_total{finish="cancelled"}') == 2)
        assert lone.number("tessera_slots_used") == 0 and lone.running.service.request_queue.occupied == 0
        assert lone.post("/v1/completions", prompt="war", max_tokens=2).status_code == 200


def test_a_full_queue_says_when_to_come_back(small):
    with served(small, "--slots", "1", "--queue", "1", "--context", "100000") as lone, lone.client() as client:
        long = LONG | {"stream": True}
        with client.stream("POST", "/v1/completions", json=long) as first, client.stream("POST", "/v1/completions", json=long) as second:
            lines = first.iter_lines()
            next(lines)
            assert second.status_code == 200
            full = lone.post("/v1/completions", prompt="war")
            assert full.status_code == 429 and full.headers["retry-after"] == "1" and full.json()["error"]["code"] == "queue_full"
            assert lone.number("tessera_texts_waiting") == 1
        assert lone.post("/v1/completions", prompt="war", n=3).json()["error"]["param"] == "n"
        until(lambda: lone.running.service.request_queue.occupied == 0)
        assert lone.post("/v1/completions", prompt="war", max_tokens=2).status_code == 200


def test_a_request_that_takes_too_long_is_ended(small):
    with served(small, "--slots", "1", "--context", "100000", "--request_seconds", "0.5") as lone:
        late = lone.post("/v1/completions", **LONG)
        assert late.status_code == 408 and "0.5 s" in late.json()["error"]["message"]
        streamed = lone.post("/v1/completions", **LONG, stream=True)
        assert streamed.status_code == 200 and streamed.text.endswith("\n\ndata: [DONE]\n\n") and '"code":"timeout"' in streamed.text
        until(lambda: lone.number("tessera_slots_used") == 0)
