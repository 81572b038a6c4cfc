"""/v1/chat/completions: conversations, and what an answer to them looks like."""

from typing import Any

from research.serving import schema
from research.serving.conversation import Messages
from research.serving.engine import Job, Token
from research.serving.refusal import whole_text, wrong
from research.serving.schema import Chat
from research.serving.service import Service
from research.serving.token_text import token_bytes, token_text


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
        message = schema.message(each, f"messages.{i}")
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
