"""Word-level perplexity on WikiText: the model scores detokenized prose, and its nats are divided by the words of the original file.

Two definitions, which count words differently: lm-evaluation-harness' (`Wikitext`) and Megatron-LM's (`WholeWikitext`). The
detokenizer follows the rules that both projects share.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from parallel.text import read_text
from research.evaluation import statistics
from research.evaluation.examples import FileTask
from research.evaluation.perplexity import rolling_windows, sliding_windows, window_sizes
from research.evaluation.scorer import Score, ScoreRequest
from research.evaluation.task import Metric, TaskContext, TaskRequests
from research.tracking.metrics import perplexity

PUNCTUATION: tuple[tuple[str, str], ...] = (
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
PAIRS = ("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'")
"""Brackets and quotes. Blanks inside of them are left out."""
OTHERS = (
    *(("= = = =", "===="), ("= = =", "==="), ("= =", "==")),
    *((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
)


def detokenize(text: str) -> str:
    """The text as prose. The second rule replaces a match by the pattern itself: a mistake of the original, kept for equal metrics."""
    text = re.sub(r"/' [0-9]/", "/'[0-9]/", text.replace("s '", "s'"))
    for old, new in PUNCTUATION:
        text = text.replace(old, new)
    for opening, closing in PAIRS:
        text = strip_inside(text, opening, closing)
    for old, new in OTHERS:
        text = text.replace(old, new)
    return text


def strip_inside(text: str, opening: str, closing: str) -> str:
    """Removes the blanks behind each `opening` and before the `closing` that follows it.

    The original does it with regular expressions. These take time in proportion to the cube of a text with a bracket that is never closed.
    """
    *parts, rest = text.split(closing)
    if opening == closing:  # each second part is inside; the last one is, too, if nothing closes it
        inside = [part.strip() if i % 2 else part for i, part in enumerate(parts)]
        return closing.join([*inside, rest])
    pieces = (part.partition(opening) for part in parts)
    return "".join(f"{before}{found}{after.strip()}{closing}" for before, found, after in pieces) + rest


def pages(text: str) -> list[str]:
    """The articles, each beginning with its heading ` = Title = `, split as in EleutherAI/wikitext_document_level."""
    articles: list[list[str]] = [[]]
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            articles.append([])
        articles[-1].append(line)
    *before, last = ["\n".join(lines) for lines in articles]
    return [page for page in before if page.strip()] + [last]


@dataclass(frozen=True)
class Wikitext(FileTask):
    """lm-evaluation-harness' `wikitext`: each article on its own, after end-of-text, in rolling windows.

    Words are what white space separates in the article as it is in the file, including empty words at its ends. Bytes are those of
    the file too.
    """

    USES: ClassVar[tuple[str, ...]] = ("limit", "window", "stride")

    def requests(self, context: TaskContext) -> TaskRequests:
        """One or more requests per article."""
        window, stride = window_sizes(self.options, context.length)
        articles = list(islice(pages(read_text(self.path)), self.options.limit))
        requests: list[ScoreRequest] = []
        ends = []
        for article in articles:
            ids = [context.tokenizer.end_of_text, *context.tokenizer.encode(detokenize(article))]
            requests += rolling_windows(ids, window, stride)
            ends.append(len(requests))
        return TaskRequests(requests, len(articles), lambda scores: metrics_by_article(scores, articles, ends))


def metrics_by_article(scores: Sequence[Score], articles: Sequence[str], ends: Sequence[int]) -> list[Metric]:
    """word_perplexity, byte_perplexity and bits_per_byte. The scores of article i are scores[ends[i − 1] : ends[i]]."""
    nats = [-math.fsum(score.logprob for score in scores[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    words = [float(len(re.split(r"\s+", article))) for article in articles]
    sizes = [float(len(article.encode("utf-8"))) for article in articles]
    per_byte, stderr = math.fsum(nats) / sum(sizes), statistics.of_ratio(nats, sizes)
    return [
        exponential("word_perplexity", math.fsum(nats) / sum(words), statistics.of_ratio(nats, words)),
        exponential("byte_perplexity", per_byte, stderr),
        Metric("bits_per_byte", per_byte / math.log(2), stderr and stderr / math.log(2)),
    ]


@dataclass(frozen=True)
class WholeWikitext(FileTask):
    """Megatron-LM's WIKITEXT103 evaluation: the whole file as one text, detokenized, without end-of-text.

    Megatron-LM's --overlapping-eval is the stride. Words are what single spaces separate in the file as it is, so each line end counts
    as one; the first word is not predicted and not counted.
    """

    USES: ClassVar[tuple[str, ...]] = ("limit", "window", "stride")

    def requests(self, context: TaskContext) -> TaskRequests:
        """One request per window."""
        window, stride = window_sizes(self.options, context.length)
        raw = read_text(self.path)
        ids = context.tokenizer.encode(detokenize(raw))
        requests = list(islice(sliding_windows(ids, window, stride), self.options.limit))
        words = len(raw.strip().split(" ")) - 1
        return TaskRequests(requests, len(requests), lambda scores: metrics_of_whole(scores, len(ids) - 1, words))


def metrics_of_whole(scores: Sequence[Score], tokens: int, words: int) -> list[Metric]:
    """loss per token, perplexity, and word_perplexity = e^(loss · tokens / words), also if only some of the tokens were scored."""
    nats, counts = [-score.logprob for score in scores], [float(len(score.logprobs)) for score in scores]
    loss, stderr, ratio = math.fsum(nats) / sum(counts), statistics.of_ratio(nats, counts), tokens / words
    return [
        Metric("loss", loss, stderr),
        exponential("perplexity", loss, stderr),
        exponential("word_perplexity", loss * ratio, None if stderr is None else stderr * ratio),
    ]


def exponential(name: str, mean: float, stderr: float | None) -> Metric:
    """The metric e^mean; its standard error by linearisation."""
    value = perplexity(mean)
    return Metric(name, value, None if stderr is None or math.isinf(value) else stderr * value)
