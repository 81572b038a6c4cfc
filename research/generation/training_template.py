"""Chat templates for training: a conversation with its answers becomes text, of which it is known which characters are responses.

A template that marks what the assistant writes by `{% generation %} … {% endgeneration %}`, as transformers wants it, is believed. Of any
other template, a response begins where the prompt ends that a server would send for it (the messages before it, rendered with
add_generation_prompt), and ends where the conversation ends that has it as its last message, without white space after the special token
that ends a turn. So that token is part of the response, which a model has to learn to end.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from parallel.errors import Mistake
from research.data.conversations import Conversation
from research.data.rendered_text import RenderedText
from research.generation.chat_template import Messages, SpecialTokenFinder, TemplateError, divided, unused_characters
from research.generation.template_sandbox import GENERATION

BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
ADD_BLOCKS = "mark the answers in it by {% generation %} … {% endgeneration %}, and name it: --template FILE"
Span = tuple[int, int]


class TrainingTemplate:
    """The form (conversations.Form) of a chat template."""

    def __init__(
        self,
        template: str,
        name: str,
        render: Callable[[dict[str, Any]], str],
        special_tokens: Iterable[str],
        variables: Mapping[str, str],
    ) -> None:
        """`special_tokens`: all that the tokenizer has. `variables`: bos_token, eos_token, … for the template."""
        self.template, self.name, self._render, self._named = template, name, render, dict(variables)
        self._finder = SpecialTokenFinder(special_tokens)
        self._ends = tuple(self._finder.tokens)
        self._has_blocks = BLOCK.search(template) is not None
        words = json.dumps([template, sorted(self._ends), self._named], sort_keys=True)
        self.identity = f"chat template {hashlib.sha256(words.encode()).hexdigest()}"

    def render(self, conversation: Conversation) -> RenderedText:
        """As in Form. Letters of special tokens in a message stay text, as in a server."""
        place, messages, _ = conversation
        try:
            said = "".join(message["content"] for message in messages)
            first, last, begin, end = unused_characters(self.template + said, 4)
            marked = [{**message, "content": self._finder.marked(message["content"], first, last)} for message in messages]
            if self._has_blocks:
                text = self._rendered(marked, marks=dict(zip(GENERATION, (begin, end), strict=True)))
            else:
                text = self._rendered(marked)
                for start, stop in reversed(self._responses(marked, text, place)):
                    text = "".join([text[:start], begin, text[start:stop], end, text[stop:]])
        except TemplateError as error:
            way_out = "write the messages as it asks for, or name another template: --template FILE"
            raise Mistake(f"{place}: the messages {error.problem} → {way_out}") from None
        parts, spans = without_marks(divided(text, first, last, self._finder.tokens), begin, end)
        if not spans:
            raise Mistake(f"{place}: the chat template writes no response of these messages → {ADD_BLOCKS}")
        return RenderedText(place, parts, spans)

    def _responses(self, messages: Messages, whole: str, place: str) -> list[Span]:
        """The responses in the rendered text of all messages."""
        spans = []
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            prompt = self._rendered(messages[:i], add_generation_prompt=True)
            turn = whole if i + 1 == len(messages) else self._rendered(messages[: i + 1])
            if not (whole.startswith(turn) and turn.startswith(prompt) and len(turn) > len(prompt)):
                what = "the beginning of the conversation otherwise than all of it, so its responses cannot be told apart"
                raise Mistake(f"{place}: the chat template writes {what} (message {i + 1}) → {ADD_BLOCKS}")
            stripped = turn.rstrip()
            is_ended = stripped.endswith(self._ends) and len(stripped) > len(prompt)
            spans.append((len(prompt), len(stripped if is_ended else turn)))
        return spans

    def _rendered(self, messages: Messages, add_generation_prompt: bool = False, marks: Mapping[str, str] | None = None) -> str:
        fixed = {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        return self._render({"messages": messages, **fixed, **self._named, **(marks or {})})


def without_marks(parts: list[tuple[str, bool]], begin: str, end: str) -> tuple[tuple[tuple[str, bool], ...], tuple[Span, ...]]:
    """The parts of a text without the two characters, and the spans of the whole text that lay between a `begin` and the next `end`."""
    kept, spans, position, opened = [], [], 0, -1
    for i, (part, is_literal) in enumerate(parts):
        for piece in re.split(f"([{begin}{end}])", part):
            if piece == begin:
                opened = position
            elif piece == end:
                if 0 <= opened < position:
                    spans.append((opened, position))
                opened = -1
            else:
                position += len(piece)
        if text := part.replace(begin, "").replace(end, ""):
            kept.append((text, is_literal))
        elif i == 0:
            kept.append(("", False))
    return tuple(kept), tuple(spans)
