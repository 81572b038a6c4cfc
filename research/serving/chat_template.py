"""How a conversation becomes the tokens after which the assistant's answer follows: by the run's chat template, or plainly.

What a template itself writes may be special tokens. The same letters in somebody's message stay letters: `<|im_end|>` in a question
ends no turn. Such places are marked before the template sees the message, by characters that are in none, as transformers does
with sanitize_control_tokens.
"""
# MERGED-DOC """Asks the sandbox's process to lay out a conversation, and starts another one where it is late."""

import json
import multiprocessing
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from research.data.tokenizer import Tokenizer
from research.serving import template_sandbox
from research.serving.errors import ApiError, wrong

PRIVATE = range(0xF0000, 0xFFFFE)
"""Characters without a meaning."""
ANSWER = "ANSWER"
Messages = list[dict[str, str]]
Ids = tuple[int, ...]


@dataclass(frozen=True)
class PlainTemplate:
    """A run without a template: `User: …` and `Assistant:`, a line each; the answer ends before the next `User:`."""

    tokenizer: Tokenizer
    ends: tuple[int, ...]
    stops: tuple[str, ...] = ("\nUser:",)
    name: str = "none with this run: User: …, Assistant: … (plain text)"

    def ids(self, messages: Messages) -> Ids:
        """The tokens of the whole conversation. Letters of special tokens are letters."""
        titles = {"system": "", "user": "User: ", "assistant": "Assistant: "}
        turns = [titles[message["role"]] + message["content"].strip() for message in messages]
        return tuple(self.tokenizer.encode("\n".join([*turns, "Assistant:"])))


@dataclass(frozen=True)
class ChatTemplate:
    """A run with one."""

    tokenizer: Tokenizer
    render: Callable[[dict[str, Any]], str]
    specials: dict[str, str]
    """What the template may call bos_token, eos_token, …"""
    ends: tuple[int, ...]
    name: str
    stops: tuple[str, ...] = ()
    _special: Any = field(init=False)
    _tokens: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        special = type(self.tokenizer.backend).from_str(self.tokenizer.backend.to_str())
        special.encode_special_tokens = False
        known = [token.content for token in special.get_added_tokens_decoder().values() if token.special]
        object.__setattr__(self, "_special", special)
        object.__setattr__(self, "_tokens", any_of(known))
        object.__setattr__(self, "ends", tuple(dict.fromkeys([*self.ends, *self.end_of_turn()])))

    def ids(self, messages: Messages) -> Ids:
        """The tokens of the whole conversation; a Refusal where the template refuses it."""
        first, last = unused("".join(text for message in messages for text in message.values()))
        marked = [{name: self._tokens.sub(f"{first}\\g<0>{last}", text) for name, text in message.items()} for message in messages]
        text = self.render({"messages": marked, "add_generation_prompt": True, "tools": None, "documents": None, **self.specials})
        return self.encode(text, first, last)

    def encode(self, text: str, first: str, last: str) -> Ids:
        """Special tokens as such, but for those between the marks; a mark that has lost the other is dropped."""
        parts = re.split(f"{first}({self._tokens.pattern}){last}|[{first}{last}]", text)
        found = list(self._special.encode(parts[0], add_special_tokens=False).ids)
        for i, part in enumerate(parts[1:], 1):
            if part:
                found += self._inside(self.tokenizer.backend if i % 2 else self._special, part)
        return tuple(found)

    def end_of_turn(self) -> Ids:
        """The special token that the template writes behind an answer, where it does."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
        told = {"messages": turns, "add_generation_prompt": False, "tools": None, "documents": None, **self.specials}
        try:
            after = self.render(told).rpartition(ANSWER)[2].lstrip()
        except ApiError:  # it may not like how these begin
            return ()
        match = self._tokens.match(after)
        return (self._special.token_to_id(match[0]),) if match else ()

    def _inside(self, backend: Any, part: str) -> list[int]:
        """The tokens of a part that does not begin the text: some tokenizers put a space in front of what does."""
        begin = backend.encode("\n", add_special_tokens=False).ids
        ids = backend.encode("\n" + part, add_special_tokens=False).ids
        return ids[len(begin) :] if ids[: len(begin)] == begin else backend.encode(part, add_special_tokens=False).ids


Conversation = PlainTemplate | ChatTemplate


def any_of(tokens: list[str]) -> re.Pattern[str]:
    """Matches any of them, the longest first; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def unused(text: str) -> tuple[str, str]:
    """Two private characters, neighbours, that are not in the text."""
    there = set(text)
    for pair in pairwise(map(chr, PRIVATE)):
        if not there.intersection(pair):
            return pair
    raise wrong("messages", "hold too many different private-use characters → leave them out")


START = 20.0
"""Seconds for a new process to begin: an interpreter on a busy machine."""


class Renderer:
    """One template. Any thread may call; one conversation is laid out at a time. `close` ends the process."""

    def __init__(self, source: str, seconds: float) -> None:
        self.source, self.seconds = source, seconds
        self._lock = threading.Lock()
        self._process: BaseProcess | None = None
        self._line: Connection | None = None

    def render(self, told: dict[str, Any]) -> str:
        """The text; a Refusal of `messages` where the template refuses them, fails or takes too long."""
        with self._lock:
            answer = self._answer(told)
        if "error" in answer:
            raise wrong("messages", f"are refused by the chat template ({answer['error']}) → send what it asks for", "template_error")
        return answer["text"]

    def close(self) -> None:
        """No more conversations."""
        with self._lock:
            self._end()

    def _answer(self, told: dict[str, Any]) -> dict[str, Any]:
        line = self._line or self._begin()
        try:
            line.send_bytes(json.dumps(told).encode())
            if line.poll(self.seconds):
                return json.loads(line.recv_bytes())
            late = f"it took more than {self.seconds:g} s"
        except (EOFError, OSError):
            late = "it has brought its process down"
        self._end()
        return {"error": late}

    def _begin(self) -> Connection:
        """A fresh interpreter, which has begun when it has laid out nothing."""
        self._end()
        spawn = multiprocessing.get_context("spawn")
        self._line, theirs = spawn.Pipe()
        self._process = spawn.Process(target=template_sandbox.serve, args=(self.source, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._line.send_bytes(b'{"messages": []}')
        if self._line.poll(START):
            self._line.recv_bytes()
        return self._line

    def _end(self) -> None:
        if self._process is not None and self._line is not None:
            self._line.close()
            self._process.kill()
            self._process.join()
        self._process = self._line = None
