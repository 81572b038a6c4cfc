"""/v1/completions: prompts as text or as tokens, and what an answer to them looks like."""
# MERGED-DOC """/v1/chat/completions: conversations, and what an answer to them looks like."""

from typing import Any

from research.serving import requests
from research.serving.chat_template import Messages
from research.serving.engine import Job, Token
from research.serving.errors import whole_text, wrong
from research.serving.requests import Chat, Completion
from research.serving.responses import token_bytes, token_text
from research.serving.service import Service


class Chats:
    """One request and the shapes of its answer."""

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, service: Service, asked: Chat) -> None:
        service.refuse_other(asked.model)
        self.service, self.asked = service, asked
        self.ids = service.conversation.ids(_messages(asked.messages, service.limits.messages))
        tokens = asked.max_completion_tokens or asked.max_tokens or service.left(self.ids)
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        asks = service.asks(asked, service.conversation.stops, tokens, logprobs)
        length = "max_completion_tokens" if asked.max_completion_tokens else "max_tokens"
        self.jobs: list[Job] = service.jobs(self.ids, asks, service.conversation.ends, "messages", length)

    @property
    def prompt_tokens(self) -> int:
        """The conversation's, as the template lays it out."""
        return len(self.ids)

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What a stream begins with: who speaks."""
        return [self._choice(index, {"delta": {"role": "assistant", "content": ""}}, (), None)]

    def choice(self, index: int, text: str, tokens: tuple[Token, ...], finish: str | None) -> dict[str, Any]:
        """A part of an answer, as a stream sends it."""
        return self._choice(index, {"delta": {"content": text} if text else {}}, tokens, finish)

    def whole(self, index: int, text: str, tokens: tuple[Token, ...], finish: str) -> dict[str, Any]:
        """An answer, whole."""
        return self._choice(index, {"message": {"role": "assistant", "content": text, "refusal": None}}, tokens, finish)

    def _choice(self, index: int, said: dict[str, Any], tokens: tuple[Token, ...], finish: str | None) -> dict[str, Any]:
        logprobs = {"content": [self._logprob(token) for token in tokens], "refusal": None} if self.asked.logprobs else None
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}

    def _logprob(self, token: Token) -> dict[str, Any]:
        return {**self._token(token.id, token.logprob), "top_logprobs": [self._token(*pair) for pair in token.top]}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        words = self.service.tokenizer
        return {"token": token_text(words, token), "logprob": logprob, "bytes": token_bytes(words, token)}


def _messages(given: list[Any], most: int) -> Messages:
    """Each as {"role", "content"} and, where there is one, "name". OpenAI's `developer` is what models know as `system`."""
    if len(given) > most:
        raise wrong("messages", f"holds {len(given)}, more than {most} → leave out the oldest")
    found = []
    for i, each in enumerate(given):
        message = requests.message(each, f"messages.{i}")
        told = {"role": message.role.replace("developer", "system"), "content": _content(message.content, f"messages.{i}.content")}
        found.append(told | ({"name": message.name} if message.name else {}))
    return found


def _content(given: Any, place: str) -> str:
    """The text of a message: a string, or parts that are text."""
    text = given if isinstance(given, str) else "".join(_part(part, f"{place}.{i}") for i, part in enumerate(_parts(given, place)))
    return whole_text(text, place)


def _parts(given: Any, place: str) -> list[Any]:
    if not isinstance(given, list) or not given:
        raise wrong(place, 'does not work → send text, or a list of {"type": "text", "text": "…"}', "invalid_type")
    return given


def _part(part: Any, place: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise wrong(place, 'is not {"type": "text", "text": "…"} → the model reads text only', "unsupported_content")
    if not isinstance(part.get("text"), str):
        raise wrong(f"{place}.text", "is no text → send a string", "invalid_type")
    return part["text"]


USUAL_TOKENS = 16
"""OpenAI's default for max_tokens."""
KINDS = "text, a list of token ids, or a list of either"


class Completions:
    """One request and the shapes of its answer. Choice i is text i % n of prompt i // n."""

    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, service: Service, asked: Completion) -> None:
        service.refuse_other(asked.model)
        self.service, self.asked = service, asked
        self.prompts = [self._ids(prompt, place) for place, prompt in _prompts(asked.prompt, service.limits.prompts)]
        self.jobs: list[Job] = []
        for number, ids in enumerate(self.prompts):
            tokens = asked.max_tokens or min(USUAL_TOKENS, service.left(ids))
            asks = service.asks(asked, (), tokens, asked.logprobs, number)
            self.jobs += service.jobs(ids, asks, service.ends, "prompt", "max_tokens")

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counts once, however many texts follow it."""
        return sum(map(len, self.prompts))

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What a stream begins with: the prompt, where it is to be echoed."""
        return [self.choice(index, self._echo(index), (), None)] if self.asked.echo else []

    def choice(self, index: int, text: str, tokens: tuple[Token, ...], finish: str | None) -> dict[str, Any]:
        """A part of a text, as a stream sends it."""
        logprobs = None if self.asked.logprobs is None else self._logprobs(tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def whole(self, index: int, text: str, tokens: tuple[Token, ...], finish: str) -> dict[str, Any]:
        """A text, whole."""
        return self.choice(index, (self._echo(index) if self.asked.echo else "") + text, tokens, finish)

    def _echo(self, index: int) -> str:
        return self.service.tokenizer.decode(self.prompts[index // self.asked.n])

    def _logprobs(self, tokens: tuple[Token, ...]) -> dict[str, Any]:
        words = self.service.tokenizer
        return {
            "tokens": [token_text(words, token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.start for token in tokens],
        }

    def _top(self, token: Token) -> dict[str, float]:
        """The likeliest first. Two tokens may have one text, half a character's: the likelier one counts."""
        found: dict[str, float] = {}
        for other, logprob in token.top:
            found.setdefault(token_text(self.service.tokenizer, other), logprob)
        return found

    def _ids(self, prompt: Any, place: str) -> tuple[int, ...]:
        words = self.service.tokenizer
        if isinstance(prompt, str):
            return words.prompt(whole_text(prompt, place))
        if len(prompt) > self.service.context:
            raise wrong(place, f"has {len(prompt)} tokens, the context has {self.service.context} → send fewer", "context_length_exceeded")
        for token in prompt:
            if not 0 <= token < words.vocab_size:
                raise wrong(place, f"holds the id {token}, the tokenizer has 0 to {words.vocab_size - 1} → send ids of its own")
        return tuple(prompt) or (words.end_of_text,)


def _prompts(given: Any, most: int) -> list[tuple[str, Any]]:
    """(what it is called, a string or a list of ids) of each prompt."""
    if isinstance(given, str) or _are_ids(given):
        return [("prompt", given)]
    if not isinstance(given, list) or not given:
        raise wrong("prompt", f"does not work → send {KINDS}", "invalid_type")
    if len(given) > most:
        raise wrong("prompt", f"holds {len(given)} prompts, more than {most} → send fewer at a time")
    for i, each in enumerate(given):
        if not isinstance(each, str) and not _are_ids(each):
            raise wrong(f"prompt.{i}", f"does not work → send {KINDS}", "invalid_type")
    return [(f"prompt.{i}", each) for i, each in enumerate(given)]


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(entry) is int for entry in value)
