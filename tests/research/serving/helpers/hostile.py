"""Bodies that no server should take, made by the hundred: what is wrong with each is known, and so which field must be named."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

JSON = {"content-type": "application/json"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
OTHER_TYPES = ["text/plain", "application/xml", "multipart/form-data; boundary=x", "json", ""]
SURROGATE = "\ud800"
NUMBERS = {"max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "n"}
WRONG: dict[str, list[Any]] = {
    "model": [1, [], {}, "gpt-4", "../../etc/passwd", SURROGATE, "x" * 5000],
    "max_tokens": [0, -1, 2**62, 1.5, "5", True, [], {}, 10**18],
    "temperature": [-0.1, 2.1, "1", True, [], 1e308, 1e-300, -(2**63)],
    "top_p": [0, -1, 1.1, "x", True, {}],
    "top_k": [-1, 2**40, 1.5, "x", True],
    "min_p": [-0.1, 1.1, "x", []],
    "repetition_penalty": [0, -1, 1e30, 1e-30, "x", True],
    "seed": [2**63, 1.5, "x", True, []],
    "n": [0, -1, 17, 10**9, 1.5, "2", True],
    "stop": [[""], "", [1], {}, 5, ["x"] * 17, "x" * 300, [None], [SURROGATE], SURROGATE, [["a"]]],
    "stream": [1, "true", [], {}],
    "stream_options": [1, "x", [], {"include_usage": True}, {"x": 1}],
    "logit_bias": [{"1": 1}, 1, [], "x"],
    "presence_penalty": [0.1, "x", {}, True],
    "frequency_penalty": [-2, "x", []],
}
WRONG_COMPLETIONS: dict[str, list[Any]] = {
    "prompt": [1, 1.5, {}, [], True, [[]], [1.5], [-1], [10**9], [None], [["a"]], [True], ["a", 1], ["a"] * 65, [1] * 4000, SURROGATE,
               ["a", SURROGATE], "the people " * 4000, [[1, 2], [10**9]]],
    "logprobs": [-1, 21, "1", True, 1.5],
    "echo": [1, "yes", []],
    "suffix": ["x", 1, []],
    "best_of": [2, "1", 0],
    "tools": [[]],
    "messages": [[]],
    "prompts": ["x"],
}  # fmt: skip
WRONG_CHAT: dict[str, list[Any]] = {
    "messages": [
        1, "x", {}, [], [1], ["x"], [[]], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": "robot", "content": "x"}],
        [{"role": "tool", "content": "x"}], [{"role": "user", "content": 1}], [{"role": "user", "content": []}],
        [{"role": "user", "content": [1]}], [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": SURROGATE}],
        [{"role": "user", "content": "x", "extra": 1}], [{"role": "user", "content": "x", "tool_calls": [1]}],
        [{"role": "user", "content": "x", "name": 5}], [{"role": "user", "content": "x" * 9000}], [{"role": "user", "content": "x"}] * 257,
        [{"role": SURROGATE, "content": "x"}], [1] * 100_000, [{"role": "user", "content": "x", "name": SURROGATE}],
    ],
    "logprobs": [1, "x", []],
    "top_logprobs": [-1, 5, "x"],
    "max_completion_tokens": [0, -5, 2**50, "x", True],
    "tools": [[{"type": "function"}], {}, "x"],
    "tool_choice": ["required", {"type": "function"}],
    "response_format": [{"type": "json_object"}, "x"],
    "functions": [[{"name": "f"}]],
    "modalities": [["audio"]],
    "reasoning_effort": ["high"],
    "prompt": ["x"],
    "tempersture": [1],
}  # fmt: skip


@dataclass(frozen=True)
class Hostile:
    """A request, and the field that its refusal must name (None: the body as a whole)."""

    path: str
    content: bytes | Iterator[bytes]
    headers: dict[str, str]
    param: str | None

    def __repr__(self) -> str:
        content = self.content if isinstance(self.content, bytes) else b"(chunks)"
        return f"{self.path} {self.param} {content[:300]!r}"


def bodies(chance: random.Random, count: int) -> Iterator[Hostile]:
    """`count` of them: half with one wrong field among right ones, half that are no table at all."""
    for i in range(count):
        yield _wrong_field(chance, i // 2) if i % 2 else _no_table(chance)


def _right(path: str, chance: random.Random) -> dict[str, Any]:
    asked: dict[str, Any] = {"prompt": "war"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "war"}]}
    some = {"max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "user": "me", "seed": 4, "n": 1, "stop": ["x"], "logit_bias": None}
    return asked | {name: some[name] for name in chance.sample(sorted(some), 3)}


CASES = [
    (path, name, value)
    for path, more in ((COMPLETIONS, WRONG_COMPLETIONS), (CHAT, WRONG_CHAT))
    for name, values in (WRONG | more).items()
    for value in values
]


def _wrong_field(chance: random.Random, i: int) -> Hostile:
    """Every case once, then again with other company."""
    path, name, value = CASES[i % len(CASES)]
    asked = {key: right for key, right in _right(path, chance).items() if not (name.startswith("max_") and key.startswith("max_"))}
    return Hostile(path, json.dumps(asked | {name: value}).encode(), JSON, name)


def _no_table(chance: random.Random) -> Hostile:
    path = chance.choice([COMPLETIONS, CHAT])
    whole = json.dumps(_right(path, chance)).encode()
    make: list[Callable[[], tuple[Any, dict[str, str], str | None]]] = [
        lambda: (whole[: chance.randrange(len(whole))], JSON, None),
        lambda: (whole + chance.randbytes(5), JSON, None),
        lambda: (chance.randbytes(chance.randrange(1, 5000)), JSON, None),
        lambda: (b"\xff" + whole, JSON, None),
        lambda: (whole.decode().encode("utf-16"), JSON, None),
        lambda: (whole.replace(b"war", b"w\xe9r"), JSON, None),
        lambda: (b"[" * chance.randrange(17, 300_000), JSON, None),
        lambda: (b'{"prompt":' * chance.randrange(17, 50_000), JSON, None),
        lambda: (whole.replace(b"{", b'{"user": NaN,', 1), JSON, None),
        lambda: (whole.replace(b"{", b'{"seed": Infinity,', 1), JSON, None),
        lambda: (whole.replace(b"{", b'{"temperature": 1e999,', 1), JSON, None),
        lambda: (whole.replace(b"{", b'{"seed": ' + b"7" * chance.randrange(21, 100_000) + b",", 1), JSON, None),
        lambda: (whole.replace(b"{", b'{"user": 1, "user": 2,', 1), JSON, "user"),
        lambda: (b'{"' + b"x" * 3000 + b'": 1}', JSON, "xxx"),
        lambda: (json.dumps({SURROGATE: 1}).encode(), JSON, None),
        lambda: (json.dumps({f"k{i}": i for i in range(5000)}).encode(), JSON, None),
        lambda: (b'"' + b"x" * chance.randrange(900_000) + b'"', JSON, None),
        lambda: (b" " * chance.randrange(2**20 + 1, 3 * 2**20), JSON, None),
        lambda: (iter([b"[" * 10] * chance.randrange(1, 1000)), JSON, None),  # chunked, without a length
        lambda: (iter([b" " * 65536] * 40), JSON, None),
        lambda: (whole, {"content-type": chance.choice(OTHER_TYPES)}, None),
        lambda: (b"prompt=war&n=2", {"content-type": "application/x-www-form-urlencoded"}, None),
        lambda: (b"null", JSON, None),
        lambda: (b"", JSON, None),
    ]  # fmt: skip
    content, headers, param = chance.choice(make)()
    return Hostile(path, content, headers, param)
