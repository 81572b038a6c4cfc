"""Generates text from prompts: submits them to the batch scheduler and decodes the ids it returns, as soon as their text is certain.

`generate` and the server both use it: call `submit` at any time, then `step` until nothing is left. The tokens of a text depend on
its prompt and settings only, not on the other texts in the batch.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from models.config import GPT
from models.encoder_config import T5
from models.inference.beam_search import BeamSearchParams, beam_search
from models.inference.decoder import Decoder
from research.data.tokenizer import Tokenizer
from research.generation.batching import CANCELLED, END, LENGTH, STOP, BatchScheduler, DecoderLike, Generation, Request
from research.generation.settings import GenerationSettings, refuse_long
from research.generation.sources import SourceForm
from research.generation.stop_strings import StopStringFinder

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
MAX_PENDING = 8
"""Number of ids after which bytes that form no character are returned as they are. A character has four bytes at most."""
CONTEXT = 5
"""Number of prompt ids decoded together with the first new one: a tokenizer may drop a space at the very beginning of a text."""


class SupportsDecode(Protocol):
    """A tokenizer, as far as decoding needs one."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that form no complete character become U+FFFD."""


class IncrementalDetokenizer:
    """Decodes ids that arrive one by one into complete characters, and stops before the first of the `stops` strings.

    A token may end inside a character, and a stop string may begin in one token and end in a later one: such text is held back
    until it is certain. The pieces returned by `push` and `finish` add up to the decoded text.
    """

    def __init__(self, tokenizer: SupportsDecode, prompt: Iterable[int], stops: Iterable[str] = ()) -> None:
        self.tokenizer, self._finder = tokenizer, StopStringFinder(stops)
        self.stopped = False
        """Whether a stop string was found; no text follows."""
        self.held = ""
        """Text that is held back because a stop string may begin with it."""
        self._ids = list(prompt)[-CONTEXT:]
        self._known = len(self._ids)
        """How many of the ids are decoded already; they are kept as context."""
        self._base = tokenizer.decode(self._ids)

    def push(self, token: int) -> str:
        """Adds one id and returns the text that has become certain."""
        self._ids.append(token)
        text = self.tokenizer.decode(self._ids)
        if text.endswith(UNFINISHED) and len(self._ids) - self._known < MAX_PENDING:
            return ""
        new = text[len(self._base) :]
        self._ids = self._ids[self._known :]
        self._known, self._base = len(self._ids), self.tokenizer.decode(self._ids)
        return self._release(new)

    def finish(self) -> str:
        """Returns the remaining text after the last id, without an incomplete character at its end."""
        new = self.tokenizer.decode(self._ids)[len(self._base) :].rstrip(UNFINISHED)
        rest = self._release(new) + self.held
        self.held = ""
        return rest

    def _release(self, new: str) -> str:
        """The held and the new text up to a stop string, or up to what may be the beginning of one."""
        if self.stopped:
            return ""
        text = self.held + new
        begin = self._finder.push(new)
        if begin is not None:
            text, self.stopped, self.held = text[: len(self.held) + begin], True, ""
            return text
        certain = len(text) - self._finder.held
        self.held = text[certain:]
        return text[:certain]


@dataclass(eq=False)
class GeneratedText:
    """The text generated after one prompt, so far."""

    prompt: str
    settings: GenerationSettings
    generation: Generation
    detokenizer: IncrementalDetokenizer
    text: str = ""
    """The text that is certain so far, without a stop string and without end-of-text."""
    fresh: str = ""
    """What the last step added to it."""
    starts: list[int] = field(default_factory=list)
    """For each generated id, the character of the text at which it begins."""
    score: float | None = None
    """The score of a beam; None without beam search."""

    @property
    def finish(self) -> str | None:
        """Why it ended (end_of_text, stop, length, cancelled); None while it is running."""
        return self.generation.finish


@dataclass
class TextGenerator:
    """A decoder (or a live engine during training) with its tokenizer. Not thread-safe."""

    decoder: DecoderLike
    tokenizer: Tokenizer
    model: GPT | T5
    context: int
    """The maximum number of tokens of a prompt and its text together; for an encoder–decoder those of a text."""
    ends: Collection[int] = ()
    """Ids that end a text; if empty, end-of-text."""
    source: SourceForm | None = None
    """What surrounds prompts that are sources; None if texts continue their prompts."""
    scheduler: BatchScheduler = field(init=False)
    _texts: dict[Generation, GeneratedText] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.scheduler = BatchScheduler(self.decoder, self.tokenizer.vocab_size)
        self.ends = self.ends or (self.tokenizer.end_of_text,)

    def __bool__(self) -> bool:
        return bool(self.scheduler)

    def submit(self, prompt: str, settings: GenerationSettings) -> GeneratedText:
        """Queues a prompt and returns its text, which `step` fills. Raises a Mistake if it does not fit into the context.

        An empty prompt starts a new document.
        """
        return self.submit_ids(self.ids(prompt), settings, self.ends, prompt)

    def ids(self, prompt: str) -> tuple[int, ...]:
        """The tokens of a prompt as the model reads them."""
        return self.tokenizer.prompt(prompt) if self.source is None else self.source.ids(self.tokenizer, prompt)

    def submit_ids(self, ids: tuple[int, ...], settings: GenerationSettings, ends: Collection[int], prompt: str = "") -> GeneratedText:
        """Like `submit`, for a prompt that is already tokenized (at least one id) and a text that ends at any of `ends`."""
        refuse_long(len(ids), settings.max_new_tokens, self.context, self.model)
        request = Request(ids, settings.max_new_tokens, settings.sampling, settings.seed, ends, settings.logprobs)
        generation = self.scheduler.submit(request)
        detokenizer = IncrementalDetokenizer(self.tokenizer, self.decoder.continued(ids), settings.stops)
        self._texts[generation] = GeneratedText(prompt, settings, generation, detokenizer)
        return self._texts[generation]

    def clear(self) -> None:
        """Drops every text, whose end is then CANCELLED, and empties the decoder, also after a step that failed."""
        assert isinstance(self.decoder, Decoder)
        self.decoder.clear()
        for generation in self._texts:
            generation.finish = CANCELLED
        self.scheduler, self._texts = BatchScheduler(self.decoder, self.tokenizer.vocab_size), {}

    def cancel(self, text: GeneratedText) -> None:
        """Ends a text early; does nothing if it has ended already."""
        if self._texts.pop(text.generation, None):
            self.scheduler.end(text.generation, CANCELLED)

    def step(self) -> list[GeneratedText]:
        """Generates one token for every running text, or the first one of new texts; returns the texts that got a token."""
        stepped = [self._texts[generation] for generation in self.scheduler.step()]
        for text in stepped:
            generation, detokenizer, before = text.generation, text.detokenizer, len(text.text)
            text.starts.append(before + len(detokenizer.held))
            if generation.finish != END:
                text.text += detokenizer.push(generation.ids[-1])
            if generation.finish:
                text.text += detokenizer.finish()
            if detokenizer.stopped:
                self.scheduler.end(generation, STOP)
            text.fresh = text.text[before:]
            if generation.finish:
                del self._texts[generation]
        return stepped

    def search(self, prompt: str, settings: GenerationSettings, beams: int, count: int) -> list[GeneratedText]:
        """Returns the best `count` texts of a beam search, best first.

        The decoder must be a Decoder without running texts. Of `settings`, max_new_tokens and the repetition penalty are used.
        """
        return self.search_ids(self.ids(prompt), settings, self.ends, beams, count, prompt)

    def search_ids(
        self, ids: tuple[int, ...], settings: GenerationSettings, ends: Collection[int], beams: int, count: int, prompt: str = ""
    ) -> list[GeneratedText]:
        """Like `search`, for a prompt that is already tokenized (at least one id) and texts that end at any of `ends`."""
        assert isinstance(self.decoder, Decoder)
        refuse_long(len(ids), settings.max_new_tokens, self.context, self.model)
        penalty = settings.sampling.repetition_penalty
        options = BeamSearchParams(beams, settings.max_new_tokens, tuple(ends), self.tokenizer.vocab_size, penalty)

        texts = []
        for beam in beam_search(self.decoder, ids, options)[:count]:
            finish = END if beam.ended else LENGTH
            generation = Generation(Request(ids, settings.max_new_tokens), list(beam.ids), finish=finish)
            detokenizer = IncrementalDetokenizer(self.tokenizer, self.decoder.continued(ids))
            text = GeneratedText(prompt, settings, generation, detokenizer, score=beam.score)
            text.text = "".join(map(detokenizer.push, beam.ids[: -1 if beam.ended else None])) + detokenizer.finish()
            texts.append(text)
        return texts


def as_json(text: GeneratedText, tokenizer: Tokenizer) -> dict[str, Any]:
    """A finished text as JSON data: prompt, text, finish, prompt_tokens, ids, and where requested score and logprobs."""
    generation = text.generation
    record: dict[str, Any] = {
        "prompt": text.prompt,
        "text": text.text,
        "finish": text.finish,
        "prompt_tokens": len(generation.request.prompt),
        "ids": generation.ids,
    }
    if text.score is not None:
        record["score"] = text.score
    if text.settings.logprobs is not None:
        record["logprobs"] = [
            {
                "id": token,
                "token": tokenizer.decode([token]),
                "logprob": logprob,
                "top": [{"id": other, "token": tokenizer.decode([other]), "logprob": likelihood} for other, likelihood in top],
            }
            for token, (logprob, top) in zip(generation.ids, generation.logprobs, strict=True)
        ]
    return record
