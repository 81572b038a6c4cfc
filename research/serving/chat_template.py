"""Chat templates: turn a conversation into the prompt tokens that the assistant's answer follows.

A run with a chat template uses it (ChatTemplate, rendered in a sandbox process by TemplateRenderer); a run without one gets a plain
text layout (PlainTemplate).

The text that a template itself writes may contain special tokens. The same characters in a user's message stay text: `<|im_end|>` in a
question ends no turn. Such places are marked before the template sees the message, with characters that occur in no message, as
transformers does with sanitize_control_tokens.
"""

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
from research.serving.errors import ApiError, invalid_field

PRIVATE = range(0xF0000, 0xFFFFE)
"""Private-use characters, which have no meaning."""
ANSWER = "ANSWER"
START_SECONDS = 20.0
"""Time for a new sandbox process to start: it starts a Python interpreter, possibly on a busy machine."""
Messages = list[dict[str, str]]
Ids = tuple[int, ...]


@dataclass(frozen=True)
class PlainTemplate:
    """The layout for a run without a chat template: one line per turn, `User: …` and `Assistant: …`. "\\nUser:" ends an answer."""

    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    stops: tuple[str, ...] = ("\nUser:",)
    name: str = "none with this run: User: …, Assistant: … (plain text)"

    def ids(self, messages: Messages) -> Ids:
        """Returns the tokens of the conversation. Special tokens in a message are encoded as text."""
        titles = {"system": "", "user": "User: ", "assistant": "Assistant: "}
        turns = [titles[message["role"]] + message["content"].strip() for message in messages]
        return tuple(self.tokenizer.encode("\n".join([*turns, "Assistant:"])))


@dataclass(frozen=True)
class ChatTemplate:
    """The layout that a run's chat template defines."""

    tokenizer: Tokenizer
    render: Callable[[dict[str, Any]], str]
    special_tokens: dict[str, str]
    """The template's variables bos_token, eos_token, …"""
    end_ids: tuple[int, ...]
    """The tokens that end an answer. The token that the template writes after an assistant's turn is added to the given ones."""
    name: str
    stops: tuple[str, ...] = ()
    _special_backend: Any = field(init=False)
    """A copy of the tokenizer's backend that encodes special tokens as such."""
    _pattern: re.Pattern[str] = field(init=False)
    """Matches any special token, the longest first; matches nothing if there are none."""

    def __post_init__(self) -> None:
        backend = type(self.tokenizer.backend).from_str(self.tokenizer.backend.to_str())
        backend.encode_special_tokens = False
        special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
        pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        object.__setattr__(self, "_special_backend", backend)
        object.__setattr__(self, "_pattern", pattern)
        object.__setattr__(self, "end_ids", tuple(dict.fromkeys([*self.end_ids, *self._end_of_turn()])))

    def ids(self, messages: Messages) -> Ids:
        """Returns the tokens of the conversation. Raises an ApiError if the template rejects it."""
        first, last = unused_characters("".join(text for message in messages for text in message.values()))
        marked = [{name: self._pattern.sub(f"{first}\\g<0>{last}", text) for name, text in message.items()} for message in messages]
        text = self.render(self._variables(marked, add_generation_prompt=True))

        # Special tokens between the marks are text, all others are tokens. A mark that has lost its partner is dropped.
        parts = re.split(f"{first}({self._pattern.pattern}){last}|[{first}{last}]", text)
        ids = list(self._special_backend.encode(parts[0], add_special_tokens=False).ids)
        for i, part in enumerate(parts[1:], 1):
            if part:
                ids += _encode_inside(self.tokenizer.backend if i % 2 else self._special_backend, part)
        return tuple(ids)

    def _end_of_turn(self) -> Ids:
        """The special token that the template writes after an answer, or nothing."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
        try:
            after = self.render(self._variables(turns, add_generation_prompt=False)).rpartition(ANSWER)[2].lstrip()
        except ApiError:  # the template may reject this conversation
            return ()
        match = self._pattern.match(after)
        return (self._special_backend.token_to_id(match[0]),) if match else ()

    def _variables(self, messages: Messages, add_generation_prompt: bool) -> dict[str, Any]:
        """The template's variables, as transformers sets them."""
        fixed = {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        return {"messages": messages, **fixed, **self.special_tokens}


def _encode_inside(backend: Any, part: str) -> list[int]:
    """Encodes a part that is not the beginning of the text: some tokenizers put a space in front of a text's first word."""
    begin = backend.encode("\n", add_special_tokens=False).ids
    ids = backend.encode("\n" + part, add_special_tokens=False).ids
    return ids[len(begin) :] if ids[: len(begin)] == begin else backend.encode(part, add_special_tokens=False).ids


def unused_characters(text: str) -> tuple[str, str]:
    """Returns two neighbouring private-use characters that the text does not contain."""
    present = set(text)
    for pair in pairwise(map(chr, PRIVATE)):
        if not present.intersection(pair):
            return pair
    raise invalid_field("messages", "hold too many different private-use characters → leave them out")


class TemplateRenderer:
    """Renders one chat template in a sandbox process, which is killed and replaced when it takes too long.

    Any thread may call `render`; one conversation is rendered at a time. `close` ends the process.
    """

    def __init__(self, source: str, seconds: float) -> None:
        self.source, self.seconds = source, seconds
        self._lock = threading.Lock()
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def render(self, variables: dict[str, Any]) -> str:
        """Returns the text. Raises an ApiError about `messages` if the template rejects them, fails or takes too long."""
        with self._lock:
            connection = self._connection or self._start()
            try:
                connection.send_bytes(json.dumps(variables).encode())
                if connection.poll(self.seconds):
                    answer = json.loads(connection.recv_bytes())
                else:
                    self._stop()
                    answer = {"error": f"it took more than {self.seconds:g} s"}
            except (EOFError, OSError):
                self._stop()
                answer = {"error": "it has brought its process down"}
        if "error" in answer:
            message = f"are refused by the chat template ({answer['error']}) → send what it asks for"
            raise invalid_field("messages", message, "template_error")
        return answer["text"]

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._stop()

    def _start(self) -> Connection:
        """Starts a new interpreter and waits until it has rendered an empty conversation."""
        self._stop()
        spawn = multiprocessing.get_context("spawn")
        self._connection, child = spawn.Pipe()
        self._process = spawn.Process(target=template_sandbox.run, args=(self.source, child), daemon=True)
        self._process.start()
        child.close()
        self._connection.send_bytes(b'{"messages": []}')
        if self._connection.poll(START_SECONDS):
            self._connection.recv_bytes()
        return self._connection

    def _stop(self) -> None:
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
        self._process = self._connection = None
