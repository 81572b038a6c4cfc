"""Perplexity a word on WikiText: nats over the model's tokens of the prose, divided by the words that WikiText's own tokens make."""
# MERGED-DOC """WikiText as prose: its tokens put together again, by the rules that Megatron-LM and lm-evaluation-harness share."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from research.evaluation import examples, statistics
from research.evaluation.examples import FileTask
from research.evaluation.perplexity import rolling_windows, sliding_windows, window_sizes
from research.evaluation.scorer import Score, ScoreRequest
from research.evaluation.task import Metric, TaskContext, TaskRequests
from research.tracking.metrics import perplexity

PLAIN: tuple[tuple[str, str], ...] = (
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
BRACKETS = (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}")
QUOTES = (r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'")
LAST = (
    *(("= = = =", "===="), ("= = =", "==="), ("= =", "==")),
    *((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
)


def detokenize(text: str) -> str:
    """The prose. The second rule puts its own pattern for what it has found, a slip of theirs that comparable figures need."""
    text = re.sub(r"/' [0-9]/", "/'[0-9]/", text.replace("s '", "s'"))
    for old, new in PLAIN:
        text = text.replace(old, new)
    for pattern, put in (*BRACKETS, *QUOTES):
        text = re.sub(pattern, put, text)
    for old, new in LAST:
        text = text.replace(old, new)
    return text


def pages(text: str) -> list[str]:
    """The articles, each from its heading ` = Title = ` on, as EleutherAI/wikitext_document_level has them."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            found.append([])
        found[-1].append(line)
    *before, last = ["\n".join(lines) for lines in found]
    return [page for page in before if page.strip()] + [last]


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

    def exam(self, given: TaskContext) -> TaskRequests:
        """Some requests an article."""
        window, stride = window_sizes(self.chosen, given.length)
        articles = list(islice(pages(examples.read_text(self.path)), self.chosen.limit))
        asked: list[ScoreRequest] = []
        ends = []
        for article in articles:
            ids = [given.tokenizer.end_of_text, *given.tokenizer.encode(detokenize(article))]
            asked += rolling_windows(ids, window, stride)
            ends.append(len(asked))
        return TaskRequests(asked, len(articles), lambda scored: by_page(scored, articles, ends))


def by_page(scored: Sequence[Score], articles: Sequence[str], ends: Sequence[int]) -> list[Metric]:
    """word_perplexity, byte_perplexity, bits_per_byte. The scores of article i are those before ends[i] and after ends[i − 1]."""
    nats = [-math.fsum(one.logprob for one in scored[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    words = [float(len(re.split(r"\s+", article))) for article in articles]
    sizes = [float(len(article.encode("utf-8"))) for article in articles]
    per_byte, stderr = math.fsum(nats) / sum(sizes), statistics.of_ratio(nats, sizes)
    return [
        exponential("word_perplexity", math.fsum(nats) / sum(words), statistics.of_ratio(nats, words)),
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

    def exam(self, given: TaskContext) -> TaskRequests:
        """A request a window."""
        window, stride = window_sizes(self.chosen, given.length)
        raw = examples.read_text(self.path)
        ids = given.tokenizer.encode(detokenize(raw))
        asked = list(islice(sliding_windows(ids, window, stride), self.chosen.limit))
        words = len(raw.strip().split(" ")) - 1
        return TaskRequests(asked, len(asked), lambda scored: of_whole(scored, len(ids) - 1, words))


def of_whole(scored: Sequence[Score], tokens: int, words: int) -> list[Metric]:
    """The tokens' loss, and e^(loss · tokens / words): where only some were scored, as if the others were as likely."""
    nats, counts = [-one.logprob for one in scored], [float(len(one.logprobs)) for one in scored]
    loss, stderr, ratio = math.fsum(nats) / sum(counts), statistics.of_ratio(nats, counts), tokens / words
    return [
        Metric("loss", loss, stderr),
        exponential("perplexity", loss, stderr),
        exponential("word_perplexity", loss * ratio, None if stderr is None else stderr * ratio),
    ]
