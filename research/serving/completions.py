"""/v1/completions: prompts as text or as tokens, and what an answer to them looks like."""

from typing import Any

from research.serving.engine import Job, Token
from research.serving.refusal import whole_text, wrong
from research.serving.schema import Completion
from research.serving.service import Service
from research.serving.token_text import token_text

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
