"""Perplexity and bits per byte of running text: the run's held-out text, or any file that can be a corpus.

The text is split into windows. Every token but the first is scored once: the last `stride` tokens of each window, given what precedes
them in the window.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from parallel.errors import Mistake
from research.data import prepare
from research.evaluation import statistics
from research.evaluation.scorer import Score, ScoreRequest
from research.evaluation.task import Metric, Settings, TaskContext, TaskRequests
from research.tracking.metrics import perplexity


def window_sizes(settings: Settings, length: int) -> tuple[int, int]:
    """(window, stride) for a scorer that takes `length` tokens. Raises a Mistake if they do not fit together."""
    window = length if settings.window is None else settings.window
    if not 2 <= window <= length:
        raise Mistake(f"--window {window} does not work, the model takes 2 to {length} tokens, the last of which is predicted → use that")
    stride = window - 1 if settings.stride is None else settings.stride
    if not 1 <= stride < window:
        raise Mistake(f"--stride {stride} does not work with a window of {window} tokens → use 1 to {window - 1}")
    return window, stride


def sliding_windows(ids: Sequence[int], window: int, stride: int) -> Iterator[ScoreRequest]:
    """Windows that begin every `stride` tokens, as in transformers' documentation ("Perplexity of fixed-length models").

    The first window scores all its tokens but one; the last may be shorter. stride = window − 1 is what validation during training does.
    """
    scored_to = 1
    for begin in range(0, max(len(ids) - 1, 0), stride):
        end = min(begin + window, len(ids))
        yield ScoreRequest(tuple(ids[begin:end]), end - scored_to)
        scored_to = end
        if end == len(ids):
            return


def rolling_windows(ids: Sequence[int], window: int, stride: int) -> Iterator[ScoreRequest]:
    """Like `sliding_windows`, but the last window has full length too.

    With stride = window − 1 this is lm-evaluation-harness' rolling log-likelihood.
    """
    scored_to = 1
    while scored_to < len(ids):
        end = min(window if scored_to == 1 else scored_to + stride, len(ids))
        yield ScoreRequest(tuple(ids[max(0, end - window) : end]), end - scored_to)
        scored_to = end


@dataclass(frozen=True)
class Perplexity:
    """The documents of a corpus, joined by end-of-text; every token but the first is scored once.

    Without window and stride, `loss`, `perplexity` and `bits_per_byte` of the validation split equal the run's own val/… metrics of all
    held-out tokens (schedule.validate_tokens = 0).
    """

    name: str
    options: Settings
    corpus: str | None = None
    """None: the run's validation split."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the task uses, as JSON data."""
        return {"limit": self.options.limit, "window": self.options.window, "stride": self.options.stride}

    def digest(self, context: TaskContext) -> str:
        """SHA-256 of the text as stored and of the format it is read in, in hexadecimal."""
        return prepare.digest(context.data, self.corpus or context.data.validation, context.root, context.progress)

    def requests(self, context: TaskContext) -> TaskRequests:
        """One request per window."""
        text, limit = self.corpus or context.data.validation, self.options.limit
        stores = prepare.held_out_stores(context.data, text, context.root, context.tokenizer, context.progress, counts_bytes=limit is None)
        window, stride = window_sizes(self.options, context.length)
        most = None if limit is None else 1 + window + limit * stride
        windows = (sliding_windows(store.tokens[:most].tolist(), window, stride) for store in stores)
        requests = list(islice(chain.from_iterable(windows), limit))
        complete = sum(request.scored for request in requests) == sum(store.num_tokens - 1 for store in stores)
        known = complete and all("bytes" in store.facts for store in stores)
        num_bytes = sum(store.num_bytes for store in stores) if known else None
        return TaskRequests(requests, len(requests), lambda scores: metrics_of(scores, num_bytes))


def metrics_of(scores: Sequence[Score], num_bytes: int | None) -> list[Metric]:
    """loss (nats per token), perplexity and bits_per_byte.

    `num_bytes`: of the whole text; None if only a part of it is scored, whose bytes are not known: there is no bits_per_byte then.
    """
    nats, counts = [-score.logprob for score in scores], [float(len(score.logprobs)) for score in scores]
    total, tokens, stderr = math.fsum(nats), sum(counts), statistics.of_ratio(nats, counts)
    loss = total / tokens
    metrics = [Metric("loss", loss, stderr), Metric("perplexity", perplexity(loss), stderr and stderr * perplexity(loss))]
    if num_bytes is not None:
        bits = math.log(2) * num_bytes
        metrics.append(Metric("bits_per_byte", total / bits, stderr and stderr * tokens / bits))
    return metrics
