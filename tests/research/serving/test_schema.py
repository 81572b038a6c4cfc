"""Fields: what asks for nothing is accepted, what asks for something that is not there is refused by its name."""

import pytest

from research.serving import schema
from research.serving.refusal import Refusal

SAID = {"messages": [{"role": "user", "content": "hi"}]}
NEUTRAL_CHAT = {
    "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "logit_bias": {}, "presence_penalty": 0,
    "frequency_penalty": 0.0, "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "response_format": {"type": "text"},
    "modalities": ["text"], "logprobs": False, "top_logprobs": None, "stop": None, "stream_options": None, "seed": None, "n": None,
    "max_tokens": None, "functions": None, "reasoning_effort": None, "prompt_cache_key": "k", "safety_identifier": "s",
}  # fmt: skip


def test_what_clients_send_without_meaning_anything_is_accepted():
    asked = schema.chat(SAID | NEUTRAL_CHAT)
    assert asked == schema.chat(SAID) and asked.temperature == 1 and asked.n == 1 and not asked.stream
    for name, value in NEUTRAL_CHAT.items():
        assert schema.chat(SAID | {name: value}) == asked, name
    assert schema.completion({"prompt": "x", "best_of": 1, "suffix": "", "user": "me"}) == schema.completion({"prompt": "x"})


@pytest.mark.parametrize(
    ("name", "value"),
    [("tools", [{"type": "function"}]), ("tool_choice", "required"), ("logit_bias", {"5": 1}), ("presence_penalty", 0.5),
     ("presence_penalty", False), ("frequency_penalty", -1), ("response_format", {"type": "json_schema"}), ("modalities", ["audio"]),
     ("functions", [{}]), ("audio", {}), ("prediction", {}), ("reasoning_effort", "low"), ("web_search_options", {})],
)  # fmt: skip
def test_what_is_not_there_is_refused_by_its_name(name, value):
    with pytest.raises(Refusal) as refused:
        schema.chat(SAID | {name: value})
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
        ({"top_p": 0}, "top_p", "greater than 0"),
    ],
)
def test_the_sentence_names_the_field_and_the_way_out(asked, param, says):
    with pytest.raises(Refusal) as refused:
        schema.chat(SAID | asked)
    assert refused.value.param == param and refused.value.message.startswith(param) and says in refused.value.message


def test_stop_is_one_or_several():
    assert schema.chat(SAID | {"stop": "x"}).stop == ["x"] and schema.chat(SAID | {"stop": ["x", "y"]}).stop == ["x", "y"]


def test_messages():
    assert schema.message({"role": "assistant", "content": "x", "tool_calls": None, "refusal": None, "annotations": []}, "m").content == "x"
    for wrong, param in (({"role": "tool", "content": "x"}, "m.role"), ({"role": "user"}, "m.content"), ({"content": "x"}, "m.role")):
        with pytest.raises(Refusal) as refused:
            schema.message(wrong, "m")
        assert refused.value.param == param
