"""The endpoints /v1/completions and /v1/chat/completions: what a request asks to generate, and the choices of the response."""

import contextlib
from collections.abc import Iterator
from typing import Any

from parallel.errors import Mistake
from research.generation.chat_template import Messages, RendererClosed, TemplateError
from research.generation.infilling import infilling_prompt
from research.serving.engine import Job, Token
from research.serving.errors import ApiError, check_unicode, invalid_field, shutting_down
from research.serving.requests import ChatRequest, CompletionRequest, validate_message
from research.serving.responses import token_bytes, token_text
from research.serving.service import Service
from research.serving.truncation import latest_messages, latest_tokens, prompt_places

DEFAULT_TOKENS = 16
"""OpenAI's default for max_tokens of /v1/completions."""
PROMPT_TYPES = "text, a list of token ids, or a list of either"


@contextlib.contextmanager
def _refused_text(place: str) -> Iterator[None]:
    """The tokenizer's or the chat template's refusal of a text becomes an error about the field that holds it."""
    try:
        yield
    except TemplateError as error:
        raise invalid_field(place, str(error), error.code) from None
    except RendererClosed:
        raise shutting_down() from None
    except Mistake as mistake:
        raise invalid_field(place, f"is refused: {mistake}", "tokenizer_error") from None


class CompletionEndpoint:
    """A request to /v1/completions: one or more prompts, `n` texts for each. Choice i is text i % n of prompt i // n."""

    object, chunk_object, id_prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, service: Service, request: CompletionRequest) -> None:
        service.check_model(request.model)
        self.service, self.request = service, request
        prompts = _prompts(request.prompt, service.limits.prompts)
        service.check_characters(sum(len(prompt) for _, prompt in prompts if isinstance(prompt, str)), "prompt")
        service.check_characters(len(request.suffix), "suffix")
        end_ids = service.end_ids
        if not request.suffix:
            self.prompts = [self._ids(prompt, place) for place, prompt in prompts]
        elif service.sentinels is None:
            message = "is not supported: the model was not trained to fill in a middle → leave it out"
            raise invalid_field("suffix", message, "unsupported_parameter")
        else:
            with _refused_text("suffix"):
                suffix = service.tokenizer.encode(check_unicode(request.suffix, "suffix"))
            prefixes = [self._text_ids(prompt, place) for place, prompt in prompts]
            self.prompts = [infilling_prompt(service.tokenizer, service.sentinels, prefix, suffix) for prefix in prefixes]
            end_ids = (*end_ids, *service.sentinels)
        self.left_out: dict[str, int] = {}
        if request.truncation == "auto":
            self._leave_out_beginnings()
        self.prompt_tokens = sum(map(len, self.prompts))
        """Each prompt counts once, however many texts follow it."""
        self.jobs: list[Job] = []
        for number, ids in enumerate(self.prompts):
            max_tokens = request.max_tokens or DEFAULT_TOKENS
            if request.truncation == "auto" or not request.max_tokens:
                max_tokens = min(max_tokens, service.tokens_left(ids))
            settings = service.generation_settings(request, (), max_tokens, request.logprobs, number)
            self.jobs += service.jobs(ids, settings, end_ids, "prompt", "max_tokens")
        self._echoed = [service.tokenizer.decode(ids) for ids in self.prompts] if request.echo else []

    def _ids(self, prompt: Any, place: str) -> tuple[int, ...]:
        """The tokens of a prompt that is a string or a list of ids, for the model to continue."""
        tokenizer = self.service.tokenizer
        if isinstance(prompt, str):
            with _refused_text(place):
                text, source = check_unicode(prompt, place), self.service.source
                return tokenizer.prompt(text) if source is None else source.ids(tokenizer, text)
        return self._text_ids(prompt, place) or (tokenizer.end_of_text,)

    def _text_ids(self, prompt: Any, place: str) -> tuple[int, ...]:
        """The tokens of a string, or those of a list of ids."""
        tokenizer = self.service.tokenizer
        if isinstance(prompt, str):
            with _refused_text(place):
                return tuple(tokenizer.encode(check_unicode(prompt, place)))
        if len(prompt) > self.service.context and self.request.truncation != "auto":
            message = f"has {len(prompt)} tokens, the context has {self.service.context} → send fewer"
            raise invalid_field(place, message, "context_length_exceeded")
        for token in prompt:
            if not 0 <= token < tokenizer.vocab_size:
                raise invalid_field(place, f"holds the id {token}, the tokenizer has 0 to {tokenizer.vocab_size - 1} → send ids of its own")
        return tuple(prompt)

    def _leave_out_beginnings(self) -> None:
        """Shortens each prompt to its last tokens, so that its text has room."""
        places = self.service.prompt_places(self.request.max_tokens or DEFAULT_TOKENS)
        whole, begin = sum(map(len, self.prompts)), self.service.tokenizer.begin
        self.prompts = [latest_tokens(ids, begin, places) for ids in self.prompts]
        self.left_out = {"tokens_left_out": whole - sum(map(len, self.prompts))}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """A stream begins with the prompt, if the request asks to echo it."""
        return [self.chunk(index, self._echoed[index // self.request.n], (), None)] if self.request.echo else []

    def chunk(self, index: int, text: str, tokens: tuple[Token, ...], finish: str | None) -> dict[str, Any]:
        """The choice of a stream's event."""
        logprobs = None
        if self.request.logprobs is not None:
            top_logprobs = []
            for token in tokens:
                # two tokens may have the same text, part of a character: the likelier one, which comes first, counts
                top: dict[str, float] = {}
                for other, logprob in token.top:
                    top.setdefault(token_text(self.service.tokenizer, other), logprob)
                top_logprobs.append(top)
            logprobs = {
                "tokens": [token_text(self.service.tokenizer, token.id) for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": top_logprobs,
                "text_offset": [token.start for token in tokens],
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def whole(self, index: int, text: str, tokens: tuple[Token, ...], finish: str) -> dict[str, Any]:
        """The choice of a response that is not streamed."""
        return self.chunk(index, (self._echoed[index // self.request.n] if self.request.echo else "") + text, tokens, finish)


def _prompts(prompt: Any, most: int) -> list[tuple[str, Any]]:
    """(name of the field, string or list of ids) of each prompt in `prompt`."""

    def are_ids(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(type(entry) is int for entry in value)

    if isinstance(prompt, str) or are_ids(prompt):
        return [("prompt", prompt)]
    if not isinstance(prompt, list) or not prompt:
        raise invalid_field("prompt", f"does not work → send {PROMPT_TYPES}", "invalid_type")
    if len(prompt) > most:
        raise invalid_field("prompt", f"holds {len(prompt)} prompts, more than {most} → send fewer at a time")
    for i, each in enumerate(prompt):
        if not isinstance(each, str) and not are_ids(each):
            raise invalid_field(f"prompt.{i}", f"does not work → send {PROMPT_TYPES}", "invalid_type")
    return [(f"prompt.{i}", each) for i, each in enumerate(prompt)]


class ChatEndpoint:
    """A request to /v1/chat/completions: a conversation, which the chat template turns into a prompt, and `n` answers."""

    object, chunk_object, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, service: Service, request: ChatRequest) -> None:
        service.check_model(request.model)
        if service.source is not None:
            raise ApiError(400, "the model writes targets for sources and has no conversations → send a source to /v1/completions")
        self.service, self.request = service, request
        messages = _messages(request.messages, service.limits.messages)
        service.check_characters(sum(len(text) for message in messages for text in message.values()), "messages")
        most = request.max_completion_tokens or request.max_tokens
        self.left_out: dict[str, int] = {}
        encode = service.chat_template.ids
        with _refused_text("messages"):
            if request.truncation == "auto":
                ids, left_out = latest_messages(messages, encode, prompt_places(service.context, most))
                self.left_out = {"messages_left_out": left_out}
                max_tokens = min(most or service.context, service.tokens_left(ids))
            else:
                ids = encode(messages)
                max_tokens = most or service.tokens_left(ids)
        self.prompt_tokens = len(ids)
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        settings = service.generation_settings(request, service.chat_template.stops, max_tokens, logprobs)
        length_field = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        self.jobs: list[Job] = service.jobs(ids, settings, service.chat_template.end_ids, "messages", length_field)

    def opening(self, index: int) -> list[dict[str, Any]]:
        """A stream begins with the role of the speaker."""
        return [self._choice(index, {"delta": {"role": "assistant", "content": ""}}, (), None)]

    def chunk(self, index: int, text: str, tokens: tuple[Token, ...], finish: str | None) -> dict[str, Any]:
        """The choice of a stream's event."""
        return self._choice(index, {"delta": {"content": text} if text else {}}, tokens, finish)

    def whole(self, index: int, text: str, tokens: tuple[Token, ...], finish: str) -> dict[str, Any]:
        """The choice of a response that is not streamed."""
        return self._choice(index, {"message": {"role": "assistant", "content": text, "refusal": None}}, tokens, finish)

    def _choice(self, index: int, message: dict[str, Any], tokens: tuple[Token, ...], finish: str | None) -> dict[str, Any]:
        tokenizer = self.service.tokenizer

        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {"token": token_text(tokenizer, token), "logprob": logprob, "bytes": token_bytes(tokenizer, token)}

        logprobs = None
        if self.request.logprobs:
            content = [{**entry(token.id, token.logprob), "top_logprobs": [entry(*top) for top in token.top]} for token in tokens]
            logprobs = {"content": content, "refusal": None}
        return {"index": index, **message, "logprobs": logprobs, "finish_reason": finish}


def _messages(values: list[Any], most: int) -> Messages:
    """Each message as {"role", "content"} and, if it has one, "name". OpenAI's role `developer` is what models know as `system`."""
    if len(values) > most:
        raise invalid_field("messages", f"holds {len(values)}, more than {most} → leave out the oldest")
    messages = []
    for i, value in enumerate(values):
        checked = validate_message(value, f"messages.{i}")
        message = {
            "role": checked.role.replace("developer", "system"),
            "content": _message_text(checked.content, f"messages.{i}.content"),
        }
        messages.append(message | ({"name": checked.name} if checked.name else {}))
    return messages


def _message_text(content: Any, place: str) -> str:
    """The text of a message whose content is a string or a list of text parts."""
    if isinstance(content, str):
        return check_unicode(content, place)
    if not isinstance(content, list) or not content:
        raise invalid_field(place, 'does not work → send text, or a list of {"type": "text", "text": "…"}', "invalid_type")
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            message = 'is not {"type": "text", "text": "…"} → the model reads text only'
            raise invalid_field(f"{place}.{i}", message, "unsupported_content")
        if not isinstance(part.get("text"), str):
            raise invalid_field(f"{place}.{i}.text", "is no text → send a string", "invalid_type")
    return check_unicode("".join(part["text"] for part in content), place)
