"""Perplexity a word on WikiText: nats over the model's tokens of the prose, divided by the words that WikiText's own tokens make."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from research.evaluation import errors, files, windows
from research.evaluation.detokenized import detokenized, pages
from research.evaluation.file_task import FileTask
from research.evaluation.task import Exam, Given, Metric
from research.metrics import perplexity
from research.scorer import Asked, Scored


@dataclass(frozen=True)
class _Windowed(FileTask):
    @property
    def settings(self) -> dict[str, Any]:
        """Windows, too."""
        return super().settings | {"window": self.chosen.window, "stride": self.chosen.stride}


@dataclass(frozen=True)
class Wikitext(_Windowed):
    """lm-evaluation-harness' `wikitext`: each article by itself, after end-of-text, in windows of which the last is full too.

    Words are what white space separates in the article as it is in the file, empty ones at its ends counted; bytes are the file's too.
    """

    def exam(self, given: Given) -> Exam:
        """Some requests an article."""
        window, stride = windows.sizes(self.chosen, given.length)
        articles = list(islice(pages(files.text(self.path)), self.chosen.limit))
        asked: list[Asked] = []
        ends = []
        for article in articles:
            ids = [given.tokenizer.end_of_text, *given.tokenizer.encode(detokenized(article))]
            asked += windows.rolling(ids, window, stride)
            ends.append(len(asked))
        return Exam(asked, len(articles), lambda scored: by_page(scored, articles, ends))


def by_page(scored: Sequence[Scored], articles: Sequence[str], ends: Sequence[int]) -> list[Metric]:
    """word_perplexity, byte_perplexity, bits_per_byte. The scores of article i are those before ends[i] and after ends[i − 1]."""
    nats = [-math.fsum(one.logprob for one in scored[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    words = [float(len(re.split(r"\s+", article))) for article in articles]
    sizes = [float(len(article.encode("utf-8"))) for article in articles]
    per_byte, stderr = math.fsum(nats) / sum(sizes), errors.of_ratio(nats, sizes)
    return [
        exponential("word_perplexity", math.fsum(nats) / sum(words), errors.of_ratio(nats, words)),
        exponential("byte_perplexity", per_byte, stderr),
        Metric("bits_per_byte", per_byte / math.log(2), stderr and stderr / math.log(2)),
    ]


def exponential(name: str, mean: float, stderr: float | None) -> Metric:
    """e^mean; its standard error by linearisation."""
    value = perplexity(mean)
    return Metric(name, value, None if stderr is None or math.isinf(value) else stderr * value)


@dataclass(frozen=True)
class WholeWikitext(_Windowed):
    """Megatron-LM's WIKITEXT103 evaluation: the whole file as one text, detokenized, no end-of-text; its --overlapping-eval is the stride.

    Words are what single spaces separate in the file as it is, so each end of a line is one; the first is not predicted and not counted.
    """

    def exam(self, given: Given) -> Exam:
        """A request a window."""
        window, stride = windows.sizes(self.chosen, given.length)
        raw = files.text(self.path)
        ids = given.tokenizer.encode(detokenized(raw))
        asked = list(islice(windows.sliding(ids, window, stride), self.chosen.limit))
        words = len(raw.strip().split(" ")) - 1
        return Exam(asked, len(asked), lambda scored: of_whole(scored, len(ids) - 1, words))


def of_whole(scored: Sequence[Scored], tokens: int, words: int) -> list[Metric]:
    """The tokens' loss, and e^(loss · tokens / words): where only some were scored, as if the others were as likely."""
    nats, counts = [-one.logprob for one in scored], [float(len(one.logprobs)) for one in scored]
    loss, stderr, ratio = math.fsum(nats) / sum(counts), errors.of_ratio(nats, counts), tokens / words
    return [
        Metric("loss", loss, stderr),
        exponential("perplexity", loss, stderr),
        exponential("word_perplexity", loss * ratio, None if stderr is None else stderr * ratio),
    ]
