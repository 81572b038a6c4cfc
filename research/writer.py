"""Text in, text out: prompts become requests of a batch, and tokens become text as soon as it is certain.

What `generate` and a server drive: `submit` at any time, then `step` until nothing is left. A text's tokens depend on its prompt
and on what is asked, not on what else is being written.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from models.beams import Search, search
from models.config import GPT
from models.decoder import Decoder
from research.ask import Ask, refuse_long
from research.batch import CANCELLED, END, LENGTH, STOP, Batch, Request, Writes, Written
from research.data.tokenizer import Tokenizer
from research.stream import Stream


@dataclass(eq=False)
class Text:
    """What is being written after one prompt."""

    prompt: str
    ask: Ask
    written: Written
    stream: Stream
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
class Writer:
    """A decoder (a live engine in training is one, too) and its tokenizer. Not for several threads at once."""

    decoder: Writes
    tokenizer: Tokenizer
    model: GPT
    context: int
    """Tokens of a prompt and its text together, at most."""
    ends: Collection[int] = ()
    """Ids that end a text; none named: end-of-text."""
    batch: Batch = field(init=False)
    _texts: dict[Written, Text] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.batch = Batch(self.decoder, self.tokenizer.vocab_size)
        self.ends = self.ends or (self.tokenizer.end_of_text,)

    def __bool__(self) -> bool:
        """Whether anything is left to write."""
        return bool(self.batch)

    def ids(self, prompt: str) -> tuple[int, ...]:
        """The prompt's tokens; an empty one is a new document's beginning."""
        return self.tokenizer.prompt(prompt)

    def submit(self, prompt: str, ask: Ask) -> Text:
        """Queues a prompt; what is returned fills with every step. A Mistake where it does not fit into the context."""
        return self.submit_ids(self.ids(prompt), ask, self.ends, prompt)

    def submit_ids(self, ids: tuple[int, ...], ask: Ask, ends: Collection[int], prompt: str = "") -> Text:
        """As `submit`, for a prompt that is tokens already (at least one), and a text that ends at any of `ends`."""
        refuse_long(len(ids), ask.max_new_tokens, self.context, self.model)
        written = self.batch.submit(Request(ids, ask.max_new_tokens, ask.choice, ask.seed, ends, ask.logprobs))
        self._texts[written] = Text(prompt, ask, written, Stream(self.tokenizer, ids, ask.stops))
        return self._texts[written]

    def clear(self) -> None:
        """Forgets every text; the decoder is empty then. What a step that failed leaves behind is gone, too."""
        assert isinstance(self.decoder, Decoder)
        self.decoder.clear()
        self.batch, self._texts = Batch(self.decoder, self.tokenizer.vocab_size), {}

    def cancel(self, text: Text) -> None:
        """Ends a text before its time."""
        if self._texts.pop(text.written, None):
            self.batch.end(text.written, CANCELLED)

    def step(self) -> list[Text]:
        """One token of every text in a row, or the first of newcomers; those that moved. `fresh` is what became certain of each."""
        moved = [self._texts[written] for written in self.batch.step()]
        for text in moved:
            self._take(text)
        return moved

    def _take(self, text: Text) -> None:
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

    def search(self, prompt: str, ask: Ask, beams: int, count: int) -> list[Text]:
        """The best `count` of a beam search, best first. The Decoder must be idle; `ask` may set a repetition penalty, and no stops."""
        assert isinstance(self.decoder, Decoder)
        ids = self.ids(prompt)
        refuse_long(len(ids), ask.max_new_tokens, self.context, self.model)
        wanted = Search(beams, ask.max_new_tokens, tuple(self.ends), self.tokenizer.vocab_size, ask.choice.repetition_penalty)
        found = []
        for beam in search(self.decoder, ids, wanted)[:count]:
            written = Written(Request(ids, ask.max_new_tokens), list(beam.ids), finish=END if beam.ended else LENGTH)
            text = Text(prompt, ask, written, Stream(self.tokenizer, ids), score=beam.score)
            text.text = "".join(map(text.stream.push, beam.ids[: -1 if beam.ended else None])) + text.stream.finish()
            found.append(text)
        return found


def row(text: Text, tokenizer: Tokenizer) -> dict[str, Any]:
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
