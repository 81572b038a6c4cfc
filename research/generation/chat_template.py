"""Chat templates: turn a conversation into the prompt tokens that the assistant's answer follows.

A run with a chat template uses it (ChatTemplate, rendered in a sandbox process by TemplateRenderer); a run without one gets a plain
text layout (PlainTemplate).

The text that a template itself writes may contain special tokens. The same characters in a user's message stay text: `<|im_end|>` in a
question ends no turn. Such places are marked before the template sees the message, with characters that occur in no message, as
transformers does with sanitize_control_tokens.
"""

import contextlib
import json
import multiprocessing
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from research.data.conversations import TITLES
from research.data.tokenizer import Tokenizer
from research.data.tokenizer_file import TEMPLATE, special_tokens_of, template_of
from research.generation import template_sandbox

PRIVATE = range(0xF0000, 0xFFFFE)
"""Private-use characters, which have no meaning."""
ANSWER = "ANSWER"
START_SECONDS = 20.0
"""Time for a new sandbox process to start: it starts a Python interpreter, possibly on a busy machine."""
Messages = list[dict[str, str]]
Ids = tuple[int, ...]


class TemplateError(Exception):
    """Messages that cannot be rendered. Its text continues a sentence that begins with them."""

    def __init__(self, problem: str, way_out: str, code: str = "template_error") -> None:
        """`code`: what a client of the server reads beside the text."""
        super().__init__(f"{problem} → {way_out}")
        self.problem, self.way_out, self.code = problem, way_out, code


class RendererClosed(Exception):
    """A conversation came after `TemplateRenderer.close`."""


@dataclass(frozen=True)
class PlainTemplate:
    """The layout for a run without a chat template: one line per turn, `User: …` and `Assistant: …`. "\\nUser:" ends an answer."""

    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    stops: tuple[str, ...] = ("\nUser:",)
    name: str = "none with this run: User: …, Assistant: … (plain text)"

    def ids(self, messages: Messages) -> Ids:
        """Returns the tokens of the conversation. Special tokens in a message are encoded as text."""
        turns = [TITLES[message["role"]] + message["content"].strip() for message in messages]
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
    _with_special: Tokenizer = field(init=False)
    """The tokenizer, except that it encodes special tokens as such."""
    _special: "SpecialTokenFinder" = field(init=False)

    def __post_init__(self) -> None:
        backend = type(self.tokenizer.backend).from_str(self.tokenizer.backend.to_str())
        backend.encode_special_tokens = False
        special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
        object.__setattr__(self, "_with_special", replace(self.tokenizer, backend=backend))
        object.__setattr__(self, "_special", SpecialTokenFinder(special))
        object.__setattr__(self, "end_ids", tuple(dict.fromkeys([*self.end_ids, *self._end_of_turn()])))

    def ids(self, messages: Messages) -> Ids:
        """Returns the tokens of the conversation. Raises a TemplateError if the template rejects it."""
        first, last = unused_characters("".join(text for message in messages for text in message.values()))
        marked = [{name: self._special.marked(text, first, last) for name, text in message.items()} for message in messages]
        text = self.render(self._variables(marked, add_generation_prompt=True))

        (head, _), *rest = divided(text, first, last, self._special.tokens)
        as_text = iter(_encode_inside(self.tokenizer, [part for part, is_text in rest if is_text]))
        as_tokens = iter(_encode_inside(self._with_special, [part for part, is_text in rest if not is_text and part]))
        ids = self._with_special.encode(head)
        for part, is_text in rest:
            ids += next(as_text) if is_text else next(as_tokens) if part else []
        return tuple(ids)

    def _end_of_turn(self) -> Ids:
        """The special token that the template writes after an answer, or nothing."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
        try:
            after = self.render(self._variables(turns, add_generation_prompt=False)).rpartition(ANSWER)[2].lstrip()
        except TemplateError:  # the template may reject this conversation
            return ()
        start, stop = next(iter(self._special.find(after)), (1, 1))
        token = None if start else self._with_special.backend.token_to_id(after[:stop])
        return () if token is None else (token,)

    def _variables(self, messages: Messages, add_generation_prompt: bool) -> dict[str, Any]:
        """The template's variables, as transformers sets them."""
        fixed = {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        return {"messages": messages, **fixed, **self.special_tokens}


@contextlib.contextmanager
def chat_template_of(
    tokenizer: Tokenizer,
    root: Path,
    end_ids: tuple[int, ...],
    seconds: float,
    characters: int,
    source: str | None = None,
    name: str = TEMPLATE,
) -> Iterator[PlainTemplate | ChatTemplate]:
    """Yields the template `source`, called `name`, else the one beside the tokenizer, else the plain layout.

    A conversation is rendered in a sandbox process within `seconds`, and may become `characters` long.
    """
    source = source or template_of(tokenizer, root)
    if source is None:
        yield PlainTemplate(tokenizer, end_ids)
        return
    renderer = TemplateRenderer(source, seconds, characters)
    try:
        yield ChatTemplate(tokenizer, renderer.render, special_tokens_of(tokenizer, root), end_ids, name)
    finally:
        renderer.close()


def _encode_inside(tokenizer: Tokenizer, parts: list[str]) -> list[list[int]]:
    """Encodes parts that are not the beginning of the text: some tokenizers put a space in front of a text's first word."""
    begin, *encoded = tokenizer.encode_batch(["\n", *(f"\n{part}" for part in parts)])
    inside = (ids[len(begin) :] if ids[: len(begin)] == begin else None for ids in encoded)
    return [tokenizer.encode(part) if ids is None else ids for ids, part in zip(inside, parts, strict=True)]


class SpecialTokenFinder:
    """Finds special tokens in a text, of several that begin at one place the longest, in one pass however many tokens there are.

    The tokenizers library does it: its tokenizer here knows these tokens only, and takes all that lies between two of them for one
    unknown word. A regular expression of many alternatives would try them one after the other at every character.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        from tokenizers import Tokenizer as Backend
        from tokenizers import models

        self.tokens = frozenset(tokens) - {""}
        self._letters = frozenset(token[0] for token in self.tokens)
        unknown = "?" * (1 + max(map(len, self.tokens), default=0))  # longer than any token, so it is none of them
        self._backend = Backend(models.WordLevel({unknown: 0}, unk_token=unknown))
        self._backend.add_special_tokens(sorted(self.tokens))

    def find(self, text: str) -> list[tuple[int, int]]:
        """The first and the last place, as of a slice, of each token in the text."""
        if self._letters.isdisjoint(text):
            return []
        [encoding] = self._backend.encode_batch([text])  # unlike `encode`, it releases the GIL
        return [place for place, identifier in zip(encoding.offsets, encoding.ids, strict=True) if identifier]

    def marked(self, text: str, first: str, last: str) -> str:
        """The text with each special token in it between `first` and `last`."""
        pieces, end = [], 0
        for start, stop in self.find(text):
            pieces += [text[end:start], first, text[start:stop], last]
            end = stop
        return "".join([*pieces, text[end:]])


def divided(text: str, first: str, last: str, special: frozenset[str]) -> list[tuple[str, bool]]:
    """A text in parts, and of each whether it is a special token between the marks, which is text; all others are tokens.

    A mark that has lost its partner is dropped. The pattern is tried again at a mark only, and ends at the next one: the time is in
    proportion to the text.
    """
    parts, end = [], 0
    for match in re.finditer(f"{first}([^{first}{last}]*){last}|[{first}{last}]", text):
        parts += [(text[end : match.start()], False), (match[1] or "", match[1] in special)]
        end = match.end()
    return [*parts, (text[end:], False)]


def unused_characters(text: str, count: int = 2) -> tuple[str, ...]:
    """Returns `count` neighbouring private-use characters that the text does not contain."""
    present = set(text)
    for first in PRIVATE[: len(PRIVATE) - count + 1]:
        marks = tuple(map(chr, range(first, first + count)))
        if not present.intersection(marks):
            return marks
    raise TemplateError("hold too many different private-use characters", "leave them out", "invalid_value")


class TemplateRenderer:
    """Renders one chat template in a sandbox process, which is killed and replaced when it takes too long.

    Any thread may call `render`; one conversation is rendered at a time. `close` ends the process.
    """

    def __init__(self, source: str, seconds: float, largest: int = template_sandbox.LARGEST) -> None:
        """`largest` bounds the characters of a rendered conversation."""
        self.source, self.seconds, self.largest = source, seconds, largest
        self._lock = threading.Lock()
        self._closed = False
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def render(self, variables: dict[str, Any]) -> str:
        """Returns the text. Raises a TemplateError if the template rejects the conversation, fails or takes too long."""
        return self.render_each([variables])[0]

    def render_each(self, tables: list[dict[str, Any]]) -> list[str]:
        """Returns the text for each table of variables, in the time for one. Raises a TemplateError if one of them fails."""
        with self._lock:
            if self._closed:
                raise RendererClosed
            connection = self._connection or self._start()
            try:
                connection.send_bytes(json.dumps(tables).encode())
                if connection.poll(self.seconds):
                    answer = json.loads(connection.recv_bytes())
                else:
                    self._stop()
                    answer = {"error": f"it took more than {self.seconds:g} s"}
            except (EOFError, OSError):
                self._stop()
                answer = {"error": "it has brought its process down"}
        if "error" in answer:
            raise TemplateError(f"are refused by the chat template ({answer['error']})", "send what it asks for")
        return answer["texts"]

    def close(self) -> None:
        """Ends the process once it has rendered what it renders. Whoever waits, or calls `render` later, is refused."""
        self._closed = True
        with self._lock:
            self._stop()

    def _start(self) -> Connection:
        """Starts a new interpreter and waits until it has rendered an empty conversation."""
        self._stop()
        spawn = multiprocessing.get_context("spawn")
        self._connection, child = spawn.Pipe()
        self._process = spawn.Process(target=template_sandbox.run, args=(self.source, self.largest, child), daemon=True)
        self._process.start()
        child.close()
        self._connection.send_bytes(b'[{"messages": []}]')
        if self._connection.poll(START_SECONDS):
            self._connection.recv_bytes()
        return self._connection

    def _stop(self) -> None:
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
        self._process = self._connection = None
