"""Text in, text out: prompts become requests of a batch, and tokens become text as soon as it is certain.

What `generate` and a server drive: `submit` at any time, then `step` until nothing is left. A text's tokens depend on its prompt
and on what is asked, not on what else is being written.
"""
# MERGED-DOC """The text of a sequence that is being written, given out as soon as it is certain: whole characters, and never a stop string.
# MERGED-DOC
# MERGED-DOC A token may end inside a character, and a stop string may begin in one token and end in a later one: such text is held back.
# MERGED-DOC """

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from models.config import GPT
from models.inference.beam_search import BeamSearchParams, beam_search
from models.inference.decoder import Decoder
from research.data.tokenizer import Tokenizer
from research.generation.batching import CANCELLED, END, LENGTH, STOP, BatchScheduler, DecoderLike, Generation, Request
from research.generation.settings import GenerationSettings, refuse_long

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
PENDING = 8
"""Tokens after which bytes that still are no character are given out as they are. A character has four bytes at most."""
BEFORE = 5
"""Tokens of the prompt that are decoded before the first new one: a tokenizer may drop a space at the very beginning of a text."""


class Decodes(Protocol):
    """A tokenizer."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no whole character become U+FFFD."""


class IncrementalDetokenizer:
    """Text of ids that come one by one. `stops`: strings at the first of which the text ends; it is not part of it."""

    def __init__(self, tokenizer: Decodes, prompt: Iterable[int], stops: Iterable[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.stopped = False
        self._ids = list(prompt)[-BEFORE:]
        self._known = len(self._ids)
        """How many of the ids have been given out; the text of those before is context."""
        self._base = tokenizer.decode(self._ids)
        self._held = ""

    @property
    def held(self) -> int:
        """Characters that are held back because a stop string may begin with them."""
        return len(self._held)

    def push(self, token: int) -> str:
        """One more id; what is certain now."""
        self._ids.append(token)
        text = self.tokenizer.decode(self._ids)
        if text.endswith(UNFINISHED) and len(self._ids) - self._known < PENDING:
            return ""
        new = text[len(self._base) :]
        self._ids = self._ids[self._known :]
        self._known, self._base = len(self._ids), self.tokenizer.decode(self._ids)
        return self._released(new)

    def finish(self) -> str:
        """No id follows: the rest, without a character that is left unfinished."""
        new = self.tokenizer.decode(self._ids)[len(self._base) :].rstrip(UNFINISHED)
        rest = self._released(new) + self._held
        self._held = ""
        return rest

    def _released(self, new: str) -> str:
        """Held and new text up to a stop string, or up to what may be the beginning of one."""
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


@dataclass(eq=False)
class GeneratedText:
    """What is being written after one prompt."""

    prompt: str
    ask: GenerationSettings
    written: Generation
    stream: IncrementalDetokenizer
    text: str = ""
    """What is certain so far. A stop string is not in it, nor is end-of-text."""
    fresh: str = ""
    """What the last step added to it."""
    starts: list[int] = field(default_factory=list)
    """Of each of its ids: the character of the text at which it begins."""
    score: float | None = None
    """A beam's."""

    @property
    def finish(self) -> str | None:
        """Why it ended (end_of_text, stop, length, cancelled); None while it goes on."""
        return self.written.finish


@dataclass
class TextGenerator:
    """A decoder (a live engine in training is one, too) and its tokenizer. Not for several threads at once."""

    decoder: DecoderLike
    tokenizer: Tokenizer
    model: GPT
    context: int
    """Tokens of a prompt and its text together, at most."""
    ends: Collection[int] = ()
    """Ids that end a text; none named: end-of-text."""
    batch: BatchScheduler = field(init=False)
    _texts: dict[Generation, GeneratedText] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.batch = BatchScheduler(self.decoder, self.tokenizer.vocab_size)
        self.ends = self.ends or (self.tokenizer.end_of_text,)

    def __bool__(self) -> bool:
        """Whether anything is left to write."""
        return bool(self.batch)

    def ids(self, prompt: str) -> tuple[int, ...]:
        """The prompt's tokens; an empty one is a new document's beginning."""
        return self.tokenizer.prompt(prompt)

    def submit(self, prompt: str, ask: GenerationSettings) -> GeneratedText:
        """Queues a prompt; what is returned fills with every step. A Mistake where it does not fit into the context."""
        return self.submit_ids(self.ids(prompt), ask, self.ends, prompt)

    def submit_ids(self, ids: tuple[int, ...], ask: GenerationSettings, ends: Collection[int], prompt: str = "") -> GeneratedText:
        """As `submit`, for a prompt that is tokens already (at least one), and a text that ends at any of `ends`."""
        refuse_long(len(ids), ask.max_new_tokens, self.context, self.model)
        written = self.batch.submit(Request(ids, ask.max_new_tokens, ask.choice, ask.seed, ends, ask.logprobs))
        self._texts[written] = GeneratedText(prompt, ask, written, IncrementalDetokenizer(self.tokenizer, ids, ask.stops))
        return self._texts[written]

    def clear(self) -> None:
        """Forgets every text; the decoder is empty then. What a step that failed leaves behind is gone, too."""
        assert isinstance(self.decoder, Decoder)
        self.decoder.clear()
        self.batch, self._texts = BatchScheduler(self.decoder, self.tokenizer.vocab_size), {}

    def cancel(self, text: GeneratedText) -> None:
        """Ends a text before its time."""
        if self._texts.pop(text.written, None):
            self.batch.end(text.written, CANCELLED)

    def step(self) -> list[GeneratedText]:
        """One token of every text in a row, or the first of newcomers; those that moved. `fresh` is what became certain of each."""
        moved = [self._texts[written] for written in self.batch.step()]
        for text in moved:
            self._take(text)
        return moved

    def _take(self, text: GeneratedText) -> None:
        """The newest token of a text, as text."""
        before, written, stream = len(text.text), text.written, text.stream
        text.starts.append(before + stream.held)
        if written.finish != END:
            text.text += stream.push(written.ids[-1])
        if written.finish:
            text.text += stream.finish()
        if stream.stopped:
            self.batch.end(written, STOP)
        text.fresh = text.text[before:]
        if written.finish:
            del self._texts[written]

    def search(self, prompt: str, ask: GenerationSettings, beams: int, count: int) -> list[GeneratedText]:
        """The best `count` of a beam search, best first. The Decoder must be idle; `ask` may set a repetition penalty, and no stops."""
        assert isinstance(self.decoder, Decoder)
        ids = self.ids(prompt)
        refuse_long(len(ids), ask.max_new_tokens, self.context, self.model)
        wanted = BeamSearchParams(beams, ask.max_new_tokens, tuple(self.ends), self.tokenizer.vocab_size, ask.choice.repetition_penalty)
        found = []
        for beam in beam_search(self.decoder, ids, wanted)[:count]:
            written = Generation(Request(ids, ask.max_new_tokens), list(beam.ids), finish=END if beam.ended else LENGTH)
            text = GeneratedText(prompt, ask, written, IncrementalDetokenizer(self.tokenizer, ids), score=beam.score)
            text.text = "".join(map(text.stream.push, beam.ids[: -1 if beam.ended else None])) + text.stream.finish()
            found.append(text)
        return found


def row(text: GeneratedText, tokenizer: Tokenizer) -> dict[str, Any]:
    """A finished text as JSON data."""
    written = text.written
    found: dict[str, Any] = {
        "prompt": text.prompt,
        "text": text.text,
        "finish": text.finish,
        "prompt_tokens": len(written.request.prompt),
        "ids": written.ids,
    }
    if text.score is not None:
        found["score"] = text.score
    if text.ask.logprobs is not None:
        found["logprobs"] = [
            {"id": token, "token": tokenizer.decode([token]), "logprob": own, "top": [_likely(tokenizer, *pair) for pair in top]}
            for token, (own, top) in zip(written.ids, written.logprobs, strict=True)
        ]
    return found


def _likely(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {"id": token, "token": tokenizer.decode([token]), "logprob": logprob}
