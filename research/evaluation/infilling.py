"""Filling in a middle: the text that a model writes between a prefix and a suffix, compared with the one that was there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from research.evaluation import examples, statistics
from research.evaluation.examples import FileTask, Row, accuracy
from research.evaluation.task import Metric, TaskContext, TextRequest, TextRequests
from research.generation.infilling import infilling_prompt

EXAMPLE = '{"prefix": "def add(a, b):\\n", "suffix": "\\n", "middle": "    return a + b"}'
FIELDS = {"prefix": str, "suffix": str, "middle": str}
MORE = 16
"""Tokens that a text may have beside twice as many as the middle."""


@dataclass(frozen=True)
class Infilling(FileTask):
    """Greedy. A run that was trained to fill in a middle sees both texts, in the order prefix, suffix, middle (PSM).

    Another run continues the prefix alone, and of its text as many lines are taken as the middle has, because nothing tells it where to
    end; `reads_suffix` is then 0. A prompt that is too long loses the beginning of the prefix and the end of the suffix.

    exact_match: the text is the middle, to the character. edit_similarity: 1 − Levenshtein distance / length of the longer of the two.
    exact_lines: exact_match if as many lines are taken of every text as the middle has, whatever the run was trained for.
    """

    def rows(self) -> Iterator[Row]:
        """The examples in order: lines with the FIELDS."""
        return examples.rows(self.path, FIELDS, EXAMPLE)

    def texts(self, context: TaskContext) -> TextRequests:
        """One text per line."""
        rows = list(islice(self.rows(), self.options.limit))
        requests, places = [], context.length - 1
        for row in rows:
            prefix, suffix, middle = context.tokenizer.encode_batch([row.fields[name] for name in FIELDS])
            if not middle:
                raise row.mistake('has no "middle" that is not empty', EXAMPLE)
            tokens = min(2 * len(middle) + MORE, places // 2)  # the rest is for the prompt
            if len(middle) >= tokens:
                raise row.mistake(
                    f"has a middle of {len(middle)} tokens, and of the {places} places of the model {tokens} are for a middle and its end",
                    EXAMPLE,
                )
            requests.append(TextRequest(_prompt(context, prefix, suffix, places - tokens), tokens, _ends(context)))
        middles = [row.fields["middle"] for row in rows]
        metrics = partial(metrics_of, middles=middles, reads_suffix=context.sentinels is not None)
        return TextRequests(requests, len(rows), metrics)


def _ends(context: TaskContext) -> tuple[int, ...]:
    return (context.tokenizer.end_of_text, *(context.sentinels or ()))


def _prompt(context: TaskContext, prefix: list[int], suffix: list[int], places: int) -> tuple[int, ...]:
    """The ids to continue, at most `places`. The suffix gets half of them, or more if the prefix needs less."""
    begin = context.tokenizer.begin
    if context.sentinels is None:
        return (*begin, *prefix[-(places - len(begin)) :]) or (context.tokenizer.end_of_text,)
    room = places - len(begin) - len(context.sentinels)
    suffix = suffix[: max(room // 2, room - len(prefix))]
    prefix = prefix[max(0, len(prefix) - (room - len(suffix))) :]
    return infilling_prompt(context.tokenizer, context.sentinels, prefix, suffix)


def first_lines(text: str, middle: str) -> str:
    """As many lines of `text` as `middle` has, the last one with its newline only if that of `middle` has one."""
    count = middle.count("\n")
    lines = text.split("\n")
    if middle.endswith("\n"):
        return "\n".join(lines[:count]) + "\n" * (len(lines) > count)
    return "\n".join(lines[: count + 1])


def metrics_of(texts: Sequence[str], middles: Sequence[str], reads_suffix: bool) -> list[Metric]:
    """exact_match, edit_similarity and exact_lines, and whether the model saw the suffix, without which its texts are cut."""
    cut = [first_lines(text, middle) for text, middle in zip(texts, middles, strict=True)]
    pairs = list(zip(texts if reads_suffix else cut, middles, strict=True))
    similar = [similarity(text, middle) for text, middle in pairs]
    return [
        accuracy("exact_match", [float(text == middle) for text, middle in pairs]),
        Metric("edit_similarity", statistics.mean(similar), statistics.of_mean(similar), higher_is_better=True),
        accuracy("exact_lines", [float(text == middle) for text, middle in zip(cut, middles, strict=True)]),
        Metric("reads_suffix", float(reads_suffix), None),
    ]


def similarity(one: str, other: str) -> float:
    """1 − Levenshtein distance / length of the longer text; 1 for two empty ones."""
    longer = max(len(one), len(other))
    return 1 - levenshtein(one, other) / longer if longer else 1.0


def levenshtein(one: str, other: str) -> int:
    """The fewest insertions, deletions and replacements of characters that make one text of the other."""
    letters = np.array([ord(letter) for letter in other], np.int64)
    places = np.arange(len(other) + 1)
    distances = places  # of the part of `one` read so far to each beginning of `other`
    for number, letter in enumerate(one, 1):
        kept_or_replaced = distances[:-1] + (letters != ord(letter))
        without_insertions = np.append(number, np.minimum(distances[1:] + 1, kept_or_replaced))
        distances = np.minimum.accumulate(without_insertions - places) + places
    return int(distances[-1])
