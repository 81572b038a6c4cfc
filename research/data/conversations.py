"""Conversations to learn from: lines of JSON with messages, or with a prompt and a response, and their form without a chat template."""

from typing import Any, NamedTuple, Protocol

from parallel.errors import Mistake, listed, listed_up_to
from parallel.text import json_value
from research.data.rendered_text import RenderedText
from research.data.text_files import MOST_NAMES, LeftOut, Reading, without_halves

TITLES = {"system": "", "user": "User: ", "assistant": "Assistant: "}
"""The roles, and what stands in front of their messages if there is no chat template."""
PAIR_EXAMPLE = '{"prompt": "…", "response": "…"}'
EXAMPLE = f'{{"messages": [{{"role": "user", "content": "…"}}, {{"role": "assistant", "content": "…"}}]}} or {PAIR_EXAMPLE}'


class Conversation(NamedTuple):
    """The messages of one line, each with `role` and `content`."""

    place: str
    """For messages to the user: 'chats.jsonl, line 3'."""
    messages: list[dict[str, str]]
    is_pair: bool
    """Whether it was written as prompt and response."""


class Form(Protocol):
    """How a conversation becomes text: without a chat template (PlainForm), or with one, which this room does not know."""

    @property
    def name(self) -> str:
        """For the user."""

    @property
    def template(self) -> str | None:
        """The chat template's text, which is kept beside the tokenizer; None: there is none."""

    @property
    def identity(self) -> str:
        """Equal for forms of which each conversation becomes the same text."""

    def render(self, conversation: Conversation) -> RenderedText:
        """The text, with the places of the responses, of which there is one at least. A Mistake if the template fails."""


class PlainForm:
    """The form without a chat template.

    A prompt is followed by its response as they are, with nothing between them. Messages are lines `User: …` and `Assistant: …`, as the
    server writes them, and a system message is a line of its own. End-of-text follows the last response, and "\\nUser:" any other, where
    a user's message comes next: where the server ends an answer, it is part of the response.
    """

    name = identity = "plain"
    template = None

    def render(self, conversation: Conversation) -> RenderedText:
        """As in Form."""
        place, messages, is_pair = conversation
        if is_pair:
            prompt, response = (message["content"] for message in messages)
            return RenderedText(place, ((prompt + response, True),), ((len(prompt), len(prompt + response)),), True, True)
        text, spans = "", []
        for i, message in enumerate(messages):
            line = TITLES[message["role"]] + message["content"].strip()
            if message["role"] == "assistant":
                is_asked_again = i + 1 < len(messages) and messages[i + 1]["role"] == "user"
                more = len("\n" + TITLES["user"].strip()) if is_asked_again else 0
                spans.append((len(text) + len(TITLES["assistant"].strip()), len(text) + len(line) + more))
            text += line + "\n" * (i + 1 < len(messages))
        return RenderedText(place, ((text, True),), tuple(spans), False, messages[-1]["role"] == "assistant")


def conversation_of(line: str, place: str, reading: Reading, left: LeftOut) -> Conversation:
    """The conversation on a line of JSON. A Mistake if it has none, or nothing to learn from."""
    value = json_value(line, place, f"one object a line: {EXAMPLE}")
    if not isinstance(value, dict):
        raise Mistake(f"{place} is no object → write one a line: {EXAMPLE}")
    if ("messages" in value) == ("prompt" in value and "response" in value):
        keys = f"its keys are {listed_up_to((repr(key)[:40] for key in value), MOST_NAMES)}" if value else "it has no key"
        what = 'both "messages" and "prompt" with "response"' if "messages" in value else 'neither "messages" nor "prompt" and "response"'
        raise Mistake(f"{place} has {what}: {keys} → write one object a line: {EXAMPLE}")
    if "messages" not in value:
        prompt, response = (_text(value[key], f'{place}: "{key}"', reading, left) for key in ("prompt", "response"))
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        if not response.strip():
            raise Mistake(f"{place} has an empty response → leave the line out, or write a response")
        return Conversation(place, messages, True)
    if not isinstance(value["messages"], list) or not value["messages"]:
        raise Mistake(f'{place}: "messages" is no list of messages → write {EXAMPLE}')
    messages = [_message(message, f"{place}, message {i}", reading, left) for i, message in enumerate(value["messages"], start=1)]
    if all(message["role"] != "assistant" for message in messages):
        raise Mistake(f"{place} has no message of the assistant, so nothing to learn → leave the line out, or add a response")
    return Conversation(place, messages, False)


def _message(value: Any, place: str, reading: Reading, left: LeftOut) -> dict[str, str]:
    if not isinstance(value, dict) or "role" not in value or "content" not in value:
        keys = f", its keys are {listed_up_to((repr(key)[:40] for key in value), MOST_NAMES)}" if isinstance(value, dict) and value else ""
        raise Mistake(f'{place} has no "role" and "content"{keys} → write {{"role": "user", "content": "…"}}')
    role = value["role"]
    if not isinstance(role, str) or role not in TITLES:
        raise Mistake(f"{place} has the unknown role {repr(role)[:40]} → use {listed(TITLES)}")
    if more := [key for key in value if key not in ("role", "content") and value[key] is not None]:
        raise Mistake(f"{place} has {listed_up_to((repr(key)[:40] for key in more), MOST_NAMES)}, which is not used → leave it out")
    content = _text(value["content"], f'{place}: "content"', reading, left)
    if role == "assistant" and not content.strip():
        raise Mistake(f"{place} is an empty response → leave the line out, or write a response")
    return {"role": role, "content": content}


def _text(value: Any, place: str, reading: Reading, left: LeftOut) -> str:
    if not isinstance(value, str):
        raise Mistake(f"{place} is no text → write {EXAMPLE}")
    return without_halves(value, place, reading, left)
