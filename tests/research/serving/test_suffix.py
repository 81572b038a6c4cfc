"""`suffix` of /v1/completions: the prompt of filling in a middle, and what is refused."""

import dataclasses
from typing import Any

import pytest

pytest.importorskip("fastapi")

from research.config import GPT
from research.data import tokenizer
from research.data.fill_in_middle import Sentinels
from research.serving.endpoints import CompletionEndpoint
from research.serving.errors import ApiError
from research.serving.limits import Limits
from research.serving.requests import CompletionRequest, validate
from research.serving.service import Service
from tests.research.helpers.example import MODEL

TOKENIZER = tokenizer.fixed("builtin:bytes+fim")
UNUSED = dict.fromkeys(field.name for field in dataclasses.fields(Service))
SERVED: dict[str, Any] = UNUSED | {
    "name": "served",
    "model": GPT(**MODEL),
    "tokenizer": TOKENIZER,
    "context": 128,
    "end_ids": (256,),
    "limits": Limits(),
    "sentinels": Sentinels(257, 258, 259),
}


def jobs(body, **changes):
    return CompletionEndpoint(Service(**SERVED | changes), validate(CompletionRequest, body)).jobs


def test_a_suffix_makes_the_prompt_of_training():
    asked = jobs({"prompt": ["def f(", "é", [97, 98]], "suffix": "):\n", "max_tokens": 5, "n": 2})
    prefixes = [b"def f(", "é".encode(), b"ab"]
    assert [job.ids for job in asked[::2]] == [(257, *prefix, 258, *b"):\n", 259) for prefix in prefixes]
    assert all(job.end_ids == (256, 257, 258, 259) for job in asked) and len(asked) == 6
    assert jobs({"prompt": "", "suffix": "x"})[0].ids == (257, 258, ord("x"), 259)


def test_without_a_suffix_nothing_changes():
    for body in ({"prompt": "war"}, {"prompt": "war", "suffix": ""}, {"prompt": "war", "suffix": None}):
        (job,) = jobs(body)
        assert (job.ids, job.end_ids) == ((*b"war",), (256,))


@pytest.mark.parametrize(
    ("body", "changes", "param", "says"),
    [
        ({"suffix": "x"}, {"sentinels": None}, "suffix", "was not trained to fill in a middle → leave it out"),
        ({"suffix": "x", "echo": True}, {}, "echo", "does not go with a suffix"),
        ({"suffix": "x", "truncation": "auto"}, {}, "truncation", "does not go with a suffix"),
        ({"suffix": 1}, {}, "suffix", "= 1 does not work → send a string"),
        ({"suffix": "\ud800"}, {}, "suffix", ""),
        ({"suffix": "x" * 200}, {}, "prompt", "the context has 128"),
        ({"suffix": "x" * 10**6}, {}, "suffix", "characters, more than"),
        ({"suffix": "x", "prompt": [300]}, {}, "prompt", "holds the id 300"),
    ],
)
def test_what_is_refused(body, changes, param, says):
    with pytest.raises(ApiError) as refused:
        jobs({"prompt": "war"} | body, **changes)
    assert refused.value.param == param and says in refused.value.message
