"""Rendered examples: the text of a conversation, which of its characters are responses, and its tokens with their mask."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from research.data.tokenizer import Tokenizer, library_error

if TYPE_CHECKING:
    import tokenizers


class RenderedText(NamedTuple):
    """A text to learn from. Its tokens are those of the whole text."""

    place: str
    """Where it comes from, for messages: 'chats.jsonl, line 3'."""
    parts: tuple[tuple[str, bool], ...]
    """The text in parts, and of each whether it is literal: whether letters of special tokens in it are letters. Parts are tokenized one by
    one, so there are several only where a user has written the letters of a special token."""
    spans: tuple[tuple[int, int], ...]
    """The responses: [start, stop) in characters of the whole text, in order, none of them empty."""
    is_prompt: bool = False
    """Whether the text begins as a prompt of `generate` does: with what Tokenizer.prompt puts in front."""
    ends: bool = False
    """Whether end-of-text follows, as a part of the last response."""

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(text for text, _ in self.parts)


class ExampleEncoder:
    """Tokenizes rendered texts: '2 n' int32, the ids and the mask, which is 1 for each token that has a character of a response."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        table = json.loads(tokenizer.backend.to_str())
        table["post_processor"] = None  # a ByteLevel one would leave white space out of the offsets
        self.tokenizer = tokenizer
        self._backends: list[tokenizers.Tokenizer] = []  # of parts that are not literal, and of those that are
        for literal in (False, True):
            backend = type(tokenizer.backend).from_str(json.dumps(table))
            backend.encode_special_tokens = literal
            self._backends.append(backend)
        self._newline = [backend.encode("\n", add_special_tokens=False).ids for backend in self._backends]

    def encode_arrays(self, texts: Sequence[RenderedText]) -> list[np.ndarray]:
        """The ids and masks of the texts, on all cores. A Mistake names the place of a text that cannot be tokenized."""
        encoded: list[list[list[Any]]] = [[[] for _ in text.parts] for text in texts]
        for literal, backend in enumerate(self._backends):
            places = [(i, k) for i, text in enumerate(texts) for k, part in enumerate(text.parts) if part[1] == bool(literal)]
            # some tokenizers put a space in front of a text's first word, which the other parts do not have
            inputs = [("\n" if k else "") + texts[i].parts[k][0] for i, k in places]
            for (i, k), (ids, offsets) in zip(places, self._encoded(backend, inputs, [texts[i] for i, _ in places]), strict=True):
                if k and ids[: len(self._newline[literal])] != self._newline[literal]:
                    [(ids, offsets)] = self._encoded(backend, [texts[i].parts[k][0]], [texts[i]])
                elif k:
                    ids, offsets = ids[len(self._newline[literal]) :], np.maximum(offsets[len(self._newline[literal]) :] - 1, 0)
                encoded[i][k] = [ids, offsets]
        return [self._array(text, parts) for text, parts in zip(texts, encoded, strict=True)]

    def _encoded(self, backend: "tokenizers.Tokenizer", inputs: list[str], texts: list[RenderedText]) -> list[tuple[list[int], np.ndarray]]:
        """(ids, 'n 2' their first and last characters, as of slices) of each input, which is a part of a text."""
        try:
            found = backend.encode_batch(inputs, add_special_tokens=False)
        except BaseException as error:
            if len(inputs) > 1:  # find the one
                return [self._encoded(backend, [part], [text])[0] for part, text in zip(inputs, texts, strict=True)]
            raise library_error(error, f"{texts[0].place}: the tokenizer {self.tokenizer.name} cannot encode the text") from None
        return [(encoding.ids, np.array(encoding.offsets, np.int64).reshape(-1, 2)) for encoding in found]

    def _array(self, text: RenderedText, parts: list[list[Any]]) -> np.ndarray:
        lengths = [len(part) for part, _ in text.parts]
        starts = np.cumsum([0, *lengths[:-1]])
        ids = [i for part_ids, _ in parts for i in part_ids]
        offsets = np.concatenate([offsets + start for (_, offsets), start in zip(parts, starts, strict=True)])
        mask = overlaps(offsets, text.spans)
        front: tuple[int, ...] = ()
        if text.is_prompt:
            front = self.tokenizer.begin or ((self.tokenizer.end_of_text,) if text.spans[0][0] == 0 else ())
        end = [self.tokenizer.end_of_text] * text.ends
        found = np.zeros((2, len(front) + len(ids) + len(end)), np.int32)
        found[0] = [*front, *ids, *end]
        found[1, len(front) : len(front) + len(ids)] = mask
        found[1, len(front) + len(ids) :] = 1
        return found


def overlaps(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """'n' bool: whether each of 'n 2' [start, stop) has a place in one of the spans, which are in order and do not meet each other.

    A token without a character counts as its next character does.
    """
    borders = np.array(spans, np.int64).reshape(-1)
    first = np.searchsorted(borders, offsets[:, 0], side="right")
    last = np.searchsorted(borders, np.maximum(offsets[:, 1] - 1, offsets[:, 0]), side="right")
    return (first % 2 == 1) | (last > first)
