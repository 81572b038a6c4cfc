"""Time in proportion to the bytes, for everything that parses what a stranger wrote.

Each parser gets the inputs that made a parser of ours or of a library slow, and others of their shapes, at n bytes and at 4n. The second
may take ten times as long at most: 4 is proportional, 16 the square. The time is the processor's, so a busy machine changes little.
"""

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from models.conversion import read_config
from parallel import text
from parallel.checkpoint import manifest
from parallel.errors import Mistake, nearest
from research.config import serialization
from research.data import tokenizer as tokenizers
from research.data import tokenizer_costs, tokenizer_file
from research.data.tokenizer import Tokenizer
from research.evaluation import lm_eval_files, wikitext
from research.exchange import hf_tokenizer, left_out
from research.generation.chat_template import ChatTemplate, SpecialTokenFinder, TemplateError
from research.generation.generator import IncrementalDetokenizer
from research.serving import requests
from research.serving.errors import ApiError
from research.tracking import metrics
from tests.research.helpers.timing import growth

MOST = 10.0
FAILURES = (Mistake, ApiError, TemplateError, ValueError, RecursionError)
"""What a parser may raise. Anything else fails the test."""


def check(call: Callable[[object], object], make: Callable[[int], object], size: int) -> None:
    def tried(value: object) -> None:
        with contextlib.suppress(*FAILURES):
            call(value)

    assert growth(lambda n: functools.partial(tried, make(n)), size) < MOST


def body(inner: str) -> Callable[[int], bytes]:
    """A prompt's value of n bytes: `inner` again and again."""
    return lambda n: b'{"prompt": [' + (inner * (n // len(inner))).encode() + b"1]}"


BODIES: dict[str, Callable[[int], bytes]] = {
    "escaped quotes": lambda n: b'"' + b'\\"' * (n // 2),
    "escaped quotes in an object": lambda n: b'{"prompt": "' + b'\\"' * (n // 2) + b'"}',
    "backslashes": lambda n: b'"' + b"\\" * n,
    "quotes": lambda n: b'"' * n,
    "brackets": lambda n: b"[" * n,
    "brackets in a string": lambda n: b'{"prompt": "' + b"[{" * (n // 2) + b'"}',
    "empty objects": body("{},"),
    "empty lists": body("[],"),
    "numbers": body("1,"),
    "floats": body("1e308,"),
    "strings": body('"a",'),
    "half characters": lambda n: b'{"prompt": "' + b"\\ud800" * (n // 6) + b'"}',
    "digits": lambda n: b'{"seed": ' + b"7" * n + b"}",
    "decimals": lambda n: b'{"seed": 0.' + b"7" * n + b"}",
    "an exponent": lambda n: b'{"seed": 1e-' + b"9" * n + b"}",
    "blanks": lambda n: b" " * n + b"{}",
    "fields": lambda n: json.dumps({f"k{i}": 0 for i in range(n // 10)}).encode(),
    "one field twice": lambda n: b"{" + b'"a":1,' * (n // 6) + b'"a":1}',
    "a long name": lambda n: b'{"' + b"k" * n + b'": 1}',
    "no UTF-8": lambda n: b'{"a": "' + b"\xff" * n + b'"}',
}


QUICK = ("escaped quotes in an object", "empty objects", "digits")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in BODIES])
def test_a_request_body(name):
    def read(raw: bytes) -> None:
        requests.validate(requests.CompletionRequest, requests.parse_json(raw, 16))

    check(read, BODIES[name], 2**13)


FIELDS: dict[str, Callable[[int], dict]] = {
    "stop strings": lambda n: {"stop": ["a"] * n},
    "a stop string": lambda n: {"stop": "a" * n},
    "logit_bias": lambda n: {"logit_bias": {str(i): 1 for i in range(n)}},
    "a model": lambda n: {"model": "a" * n},
    "unknown fields": lambda n: {f"k{i}": 0 for i in range(n // 32)},
    "messages": lambda n: {"messages": [{"role": "user", "content": "a"}] * n},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_a_request(name):
    check(functools.partial(requests.validate, requests.ChatRequest), FIELDS[name], 2**12)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return tokenizers.gpt2()


SPECIAL = ["<|im_start|>", "<|im_end|>", *(f"<|reserved_{i}|>" for i in range(250))]
TEXTS: dict[str, Callable[[int], str]] = {
    "one word": lambda n: "a" * n,
    "one word of many letters": lambda n: "etaoinshrdlu" * (n // 12),
    "blanks": lambda n: " " * n,
    "line ends": lambda n: "\n" * n,
    "apostrophes": lambda n: "'" * n,
    "digits": lambda n: "7" * n,
    "short words": lambda n: "a " * (n // 2),
    "ideographs": lambda n: "漢" * n,
    "beginnings of special tokens": lambda n: "<|" * (n // 2),
    "special tokens": lambda n: "<|im_end|>" * (n // 10),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_is_tokenized(gpt2, name):
    check(gpt2.encode, TEXTS[name], 2**13)
    check(SpecialTokenFinder(SPECIAL).find, TEXTS[name], 2**13)
    check(lambda words: list(tokenizers.pieces(words, 64)), TEXTS[name], 2**13)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_a_conversation(gpt2, name):
    """Without the time of the template's own process."""
    template = ChatTemplate(gpt2, lambda variables: "".join(message["content"] for message in variables["messages"]), {}, (), "plain")
    check(lambda words: template.ids([{"role": "user", "content": words}]), TEXTS[name], 2**13)


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["a" * 255 + "b", "ab" * 100 + "c", "b" + "a" * 255])
def test_a_text_in_which_a_stop_string_is_looked_for(stop):
    class Letters:
        def decode(self, ids):
            return "".join(map(chr, ids))

    def push(words: str) -> None:
        detokenizer = IncrementalDetokenizer(Letters(), [], [stop])
        for letter in words:
            detokenizer.push(ord(letter))

    check(push, lambda n: "a" * n, 2**9)
    check(push, lambda n: "ab" * (n // 2), 2**9)

    def finds(size: int) -> Callable[[], object]:  # and with the length of the strings
        found = IncrementalDetokenizer(Letters(), [], ["a" * size + "b"] * 16)
        return lambda: [found.push(ord("a")) for _ in range(100)]

    assert growth(finds, 64) < 3


def written(make: Callable[[int], bytes], place: Path) -> Callable[[int], Path]:
    """`make(n)` in a file."""

    def write(n: int) -> Path:
        path = place / str(n) / "config.json"
        path.parent.mkdir()
        path.write_bytes(make(n))
        return path

    return write


def table(**more: object) -> bytes:
    return json.dumps(more).encode()


FILES: dict[str, tuple[Callable[[Path], object], Callable[[int], bytes]]] = {
    "config.json of a run, unknown settings": (serialization.load, lambda n: table(schema=6, **{f"k{i}": 1 for i in range(n // 8)})),
    "config.json of a run, a long name": (serialization.load, lambda n: table(schema=6, **{"k" * n: 1})),
    "config.json of a run, digits": (serialization.load, lambda n: b'{"schema": ' + b"7" * n + b"}"),
    "config.json of a run, brackets": (serialization.load, lambda n: b"[" * n),
    "a table, brackets": (tokenizer_file.read_tokenizer_table, lambda n: b'{"a":' * (n // 5)),
    "a table, digits": (tokenizer_file.read_tokenizer_table, lambda n: b'{"a": ' + b"7" * n + b"}"),
    "metrics.jsonl, lines": (lambda path: list(metrics.read(path)), lambda n: b"{}\n" * (n // 3)),
    "metrics.jsonl, no lines": (lambda path: list(metrics.read(path)), lambda n: b"\n" * n),
    "metrics.jsonl, keys": (lambda path: metrics.last(path, ["b"]), lambda n: table(**{f"k{i}": 0.5 for i in range(n // 10)})),
    "text, lines": (lambda path: list(text.read_lines(path)), lambda n: b"\n" * n),
    "text, no UTF-8 at the end": (text.read_text, lambda n: b"a\n" * (n // 2) + b"\xff"),
    "JSON lines": (lambda path: [text.json_value(line, place, "{}") for place, line in text.read_lines(path)], lambda n: b"1\n" * (n // 2)),
    "a manifest, files": (
        lambda path: manifest.parse(path.read_bytes()),
        lambda n: table(format=1, step=1, files={f"f{i}": {} for i in range(n // 12)}, tensors={}),
    ),
    "a tokenizer.json, added tokens": (
        functools.partial(hf_tokenizer.leave_out_tokens, rows=0),
        lambda n: table(added_tokens=[{"id": i, "content": str(i)} for i in range(n // 30)]),
    ),
    "a tokenizer.json, its size": (
        lambda path: tokenizer_file.declared_vocab_size(str(path), Path()),
        lambda n: table(model={"vocab": {str(i): i for i in range(n // 12)}}),
    ),
    "config.json of a model, unknown keys": (
        lambda path: left_out.of_settings(tokenizer_file.read_tokenizer_table(path)),
        lambda n: table(model_type="llama", **{f"k{i}": i for i in range(n // 8)}),
    ),
    "config.json of a model, layers": (
        lambda path: read_config.settings(tokenizer_file.read_tokenizer_table(path)),
        lambda n: table(model_type="llama", layer_types=["full_attention"] * (n // 18)),
    ),
    "tokenizer_config.json": (
        lambda path: left_out.of_tokenizer(path.parent, 10),
        lambda n: table(added_tokens_decoder={str(i): {"content": str(i)} for i in range(n // 30)}),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_file(name, tmp_path):
    call, make = FILES[name]
    check(call, written(make, tmp_path), 2**15)


PATTERNS: dict[str, Callable[[int], list[str]]] = {
    "a bracket and blanks": lambda n: ["{" + " " * n],
    "a bracket and digits": lambda n: ["{" + "7" * n],
    "a bracket, a comma and blanks": lambda n: ["{1," + " " * n + "7" + " " * n + "x"],
    "brackets": lambda n: ["{" * n],
    "many of them": lambda n: ["{" + " " * 99] * (n // 100),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_of_a_tokenizer(name):
    """It is looked at outside of the limited process, so it has less than the most characters even at 4n."""

    def look(patterns: list[str]) -> None:
        for _ in range(20):
            tokenizer_costs.check({"pre_tokenizer": [{"Regex": pattern} for pattern in patterns]}, Path("t"))

    check(look, PATTERNS[name], 2**11)


ARTICLES: dict[str, Callable[[int], str]] = {
    "open brackets": lambda n: "(" * n,
    "an open bracket and blanks": lambda n: "(" + " " * n,
    "an open quote and blanks": lambda n: '"' + " " * n,
    "quotes": lambda n: "'" * n,
    "brackets": lambda n: "( a ) " * (n // 6),
    "headings": lambda n: "= " * (n // 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARTICLES)
def test_an_article(name):
    check(wikitext.detokenize, ARTICLES[name], 2**11)
    check(wikitext.pages, ARTICLES[name], 2**13)


@pytest.mark.slow
def test_names_and_nested_mappings():
    check(lambda name: nearest(name, ["model.num_heads", "optimizer.lr"]), lambda n: "k" * n, 2**12)

    def nested(depth: int) -> list:
        value: list = [{"task": "x"}]
        for _ in range(depth):
            value = [value, value]  # as YAML's aliases make it
        return value

    check(lambda value: list(lm_eval_files._mappings(value)), nested, 64)
