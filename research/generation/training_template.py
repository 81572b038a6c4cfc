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
        render_each: Callable[[list[dict[str, Any]]], list[str]],
        special_tokens: Iterable[str],
        variables: Mapping[str, str],
    ) -> None:
        """`special_tokens`: all that the tokenizer has. `variables`: bos_token, eos_token, … for the template."""
        self.template, self.name, self._render_each, self._named = template, name, render_each, dict(variables)
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
                [text] = self._render_each([self._variables(marked) | dict(zip(GENERATION, (begin, end), strict=True))])
            else:
                text, spans = self._responses(marked, place)
                for start, stop in reversed(spans):
                    text = "".join([text[:start], begin, text[start:stop], end, text[stop:]])
        except TemplateError as error:
            way_out = "write the messages as it asks for, or name another template: --template FILE"
            raise Mistake(f"{place}: the messages {error.problem} → {way_out}") from None
        parts, responses = without_marks(divided(text, first, last, self._finder.tokens), begin, end)
        if not responses:
            raise Mistake(f"{place}: the chat template writes no response of these messages → {ADD_BLOCKS}")
        return RenderedText(place, parts, responses)

    def _responses(self, messages: Messages, place: str) -> tuple[str, list[Span]]:
        """The rendered text of all messages, and the responses in it."""
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        prompts = [self._variables(messages[:i], add_generation_prompt=True) for i in answers]
        turns = [self._variables(messages[: i + 1]) for i in answers]
        whole, *texts = self._render_each([self._variables(messages), *prompts, *turns])
        spans = []
        for i, prompt, turn in zip(answers, texts[: len(answers)], texts[len(answers) :], strict=True):
            if not (whole.startswith(turn) and turn.startswith(prompt) and len(turn) > len(prompt)):
                what = "the beginning of the conversation otherwise than all of it, so its responses cannot be told apart"
                raise Mistake(f"{place}: the chat template writes {what} (message {i + 1}) → {ADD_BLOCKS}")
            stripped = turn.rstrip()
            is_ended = stripped.endswith(self._ends) and len(stripped) > len(prompt)
            spans.append((len(prompt), len(stripped if is_ended else turn)))
        return whole, spans

    def _variables(self, messages: Messages, add_generation_prompt: bool = False) -> dict[str, Any]:
        """The template's variables, as a server sets them."""
        fixed = {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        return {"messages": messages, **fixed, **self._named}


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
