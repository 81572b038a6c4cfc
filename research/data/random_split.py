"""The random split of `prepare --split`: which documents are trained on and which are held out, and writing the stores of both.

The other split of this folder, by order, is in splits.py: data.validation="split:969,30,1".

Documents are assigned at random: the k-th goes where its place in a permutation of all documents lies, which depends on a seed and on their
number only. Each part then has its exact share, and keeps the order of the input. They are not taken from the end, as Megatron-LM's splits
are, because inputs are sorted, by path, date or language: the last documents are not like the others.
If a part would get no document, as of a single one, tokens take the place of documents: the parts are cut from the stream in order.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from parallel.errors import Mistake
from research.data import order
from research.data.mask_store import MaskWriter
from research.data.text_files import Advance
from research.data.token_store import StoreWriter
from research.data.tokenizer import TOKENS_PER_CHARACTER, Tokenizer

NAMES = ("train", "val", "test")
EXAMPLE = "98,1,1"
SHARE = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)


class Part(NamedTuple):
    """Consecutive tokens of the whole corpus: `ids`, and for each document, or piece of one, its number of tokens and of UTF-8 bytes.

    If `is_open`, the last document goes on in the next part. Examples have a mask, which is 1 for each token of a response.
    """

    ids: np.ndarray
    tokens: np.ndarray
    num_bytes: np.ndarray
    is_open: bool
    mask: np.ndarray | None = None


def shares_of(text: str) -> dict[str, Fraction]:
    """{"train": 98/100, "val": 1/100, "test": 1/100} for '98,1,1': the parts that get anything, in order."""
    words = [word.strip() for word in text.split(",")]
    weights = [Fraction(word) for word in words if SHARE.fullmatch(word)]
    if len(weights) < len(words) or len(words) > len(NAMES):
        raise Mistake(f"--split {text} is not one to three shares, of {', '.join(NAMES)} → write for example {EXAMPLE}")
    if not weights[0]:
        raise Mistake(f"--split {text} is not one to three shares of which {NAMES[0]} has more than 0 → write for example {EXAMPLE}")
    return {name: weight / sum(weights) for name, weight in zip(NAMES, weights, strict=False) if weight}


class Split:
    """How many documents, or tokens, each part of a corpus has."""

    def __init__(self, shares: dict[str, Fraction], documents: int, tokens: int, seed: int) -> None:
        """For a corpus of so many documents and tokens. A Mistake if a part would be empty."""
        self.shares, self.documents, self.seed = shares, documents, seed
        limits = [sum(list(shares.values())[: i + 1]) for i in range(len(shares))]
        document_limits = [math.floor(documents * limit + Fraction(1, 2)) for limit in limits]
        self.by_position = bool((np.diff(document_limits, prepend=0) < 1).any())
        """Whether tokens are counted instead of documents."""
        # the end of the last document is no position to cut at
        self.limits = [math.floor((tokens - 1) * limit) for limit in limits[:-1]] + [tokens] if self.by_position else document_limits
        for name, size in zip(shares, np.diff(self.limits, prepend=0), strict=True):
            if size < 1:
                raise Mistake(
                    f"--split {','.join(f'{100 * float(share):g}' for share in shares.values())} leaves {name} without a token of {tokens} "
                    "→ use more text, or --split 100"
                )

    def line(self) -> str:
        """What the split does, for its user."""
        sizes = ", ".join(f"{name} {float(100 * share):g} %" for name, share in self.shares.items())
        if len(self.shares) == 1:
            return "none: everything is in train"
        if self.by_position:
            return f"{sizes} · by position in tokens, because {self.documents:,} document{'s are' if self.documents > 1 else ' is'} too few"
        return f"{sizes} · by document, at random with seed {self.seed}"

    def of_documents(self, numbers: np.ndarray) -> np.ndarray:
        """The part, counted from 0, of each of these documents, if documents are split."""
        return np.searchsorted(self.limits, order.sample(numbers, self.documents, self.seed), side="right")


def write_stores(parts: Iterable[Part], split: Split, folder: Path, tokenizer: Tokenizer, facts: dict[str, Any], advance: Advance) -> None:
    """Writes the stores folder/train, folder/val, … of a split, and beside them the masks of examples, which are not split by position.

    `facts` go into the sidecar of each; `advance` is told of tokens.
    """
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(StoreWriter(folder / name, tokenizer.vocab_size, facts[name])) for name in split.shares]
        masks: list[MaskWriter] = []
        done = first = 0
        for part in parts:
            if part.mask is not None and not masks:  # entered last, so that the masks appear before the stores
                masks = [stack.enter_context(MaskWriter(writer.prefix, writer.facts)) for writer in writers]
            if split.by_position:
                _add_by_position(part, done, split.limits, writers, tokenizer)
            else:
                _add_by_document(part, first, split, writers, masks)
            first += len(part.tokens) - part.is_open
            done += len(part.ids)
            advance(len(part.ids))


def _add_by_document(part: Part, first: int, split: Split, writers: list[StoreWriter], masks: list[MaskWriter]) -> None:
    where = split.of_documents(first + np.arange(len(part.tokens)))
    for number, writer in enumerate(writers):
        chosen = where == number
        if not chosen.any():
            continue
        ends = np.cumsum(part.tokens[chosen])
        if part.is_open and chosen[-1]:
            ends = ends[:-1]
        tokens = np.repeat(chosen, part.tokens)
        writer.add_tokens(part.ids[tokens], ends, int(part.num_bytes[chosen].sum()))
        if part.mask is not None:
            masks[number].add_documents(part.mask[tokens], part.tokens[chosen])


def _add_by_position(part: Part, done: int, limits: list[int], writers: list[StoreWriter], tokenizer: Tokenizer) -> None:
    """`done`: the tokens before the part."""
    ends = np.cumsum(part.tokens)
    ends = ends[: len(ends) - part.is_open]
    for (start, stop), writer in zip(_ranges(limits, done, len(part.ids)), writers, strict=True):
        if start < stop:
            inside = ends[(ends > start) & (ends <= stop)] - start
            num_bytes = _bytes_before(part, stop, tokenizer) - _bytes_before(part, start, tokenizer)
            writer.add_tokens(part.ids[start:stop], inside, num_bytes)


def _ranges(limits: list[int], done: int, tokens: int) -> Iterator[tuple[int, int]]:
    """The range of the part's tokens that each store gets."""
    cuts = [min(max(limit - done, 0), tokens) for limit in [0, *limits]]
    return zip(cuts[:-1], cuts[1:], strict=True)


def _bytes_before(part: Part, position: int, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text of the part's first tokens: a character counts with its last token."""
    ends = np.cumsum(part.tokens)
    whole = int(np.searchsorted(ends, position, side="right"))
    total = int(part.num_bytes[:whole].sum())
    start = int(ends[whole - 1]) if whole else 0
    if start < position:  # inside a piece of a document
        ids = part.ids[start:position]
        stop = int(ends[whole])
        if position == stop - 1 and part.ids[position] == tokenizer.end_of_text:
            return total + int(part.num_bytes[whole])
        text = tokenizer.decode(ids)
        more = part.ids[start : min(position + TOKENS_PER_CHARACTER, stop)]
        text = os.path.commonprefix([text, tokenizer.decode(more[more != tokenizer.end_of_text])])
        total += len(text.encode("utf-8"))
    return total
