"""Perplexity and bits per byte of running text: the run's own validation split, or any file that could be a corpus of it."""
# MERGED-DOC """Running text in windows: every token but the first is predicted once, the `stride` last of each window from what precedes them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from parallel.errors import Mistake
from research.data import documents
from research.data.token_store import TokenStore
from research.evaluation import statistics
from research.evaluation.scorer import Score, ScoreRequest
from research.evaluation.task import Metric, Settings, TaskContext, TaskRequests
from research.tracking.metrics import perplexity


def window_sizes(settings: Settings, length: int) -> tuple[int, int]:
    """(window, stride) for a scorer that takes `length` tokens. A Mistake where they do not go together."""
    window = length if settings.window is None else settings.window
    if not 2 <= window <= length:
        raise Mistake(f"--window {window} does not work, the model takes 2 to {length} tokens, the last of which is predicted → use that")
    stride = window - 1 if settings.stride is None else settings.stride
    if not 1 <= stride < window:
        raise Mistake(f"--stride {stride} does not work with a window of {window} tokens → use 1 to {window - 1}")
    return window, stride


def sliding_windows(ids: Sequence[int], window: int, stride: int) -> Iterator[ScoreRequest]:
    """Windows that begin every `stride` tokens, as in transformers' documentation ("Perplexity of fixed-length models").

    The first scores all its tokens but one, the last may be shorter. stride = window − 1 is what training's validation does.
    """
    scored_to = 1
    for begin in range(0, max(len(ids) - 1, 0), stride):
        end = min(begin + window, len(ids))
        yield ScoreRequest(tuple(ids[begin:end]), end - scored_to)
        scored_to = end
        if end == len(ids):
            return


def rolling_windows(ids: Sequence[int], window: int, stride: int) -> Iterator[ScoreRequest]:
    """As `sliding`, but the last window is as long as the others: lm-evaluation-harness' rolling log-likelihood at stride = window − 1."""
    scored_to = 1
    while scored_to < len(ids):
        end = min(window if scored_to == 1 else scored_to + stride, len(ids))
        yield ScoreRequest(tuple(ids[max(0, end - window) : end]), end - scored_to)
        scored_to = end


@dataclass(frozen=True)
class Perplexity:
    """Documents joined by end-of-text, every token but the first predicted once.

    Without window and stride, `loss`, `perplexity` and `bits_per_byte` of the validation split are the run's own val/….
    """

    name: str
    chosen: Settings
    spec: str | None = None
    """The corpus; None: the run's validation split."""

    @property
    def settings(self) -> dict[str, Any]:
        """Windows."""
        return {"limit": self.chosen.limit, "window": self.chosen.window, "stride": self.chosen.stride}

    def digest(self, given: TaskContext) -> str:
        """Of the text as stored, and of the way it is read."""
        return documents.digest(self.spec or given.data.validation, given.root)

    def exam(self, given: TaskContext) -> TaskRequests:
        """A request a window."""
        store = given.split(self.spec) if self.spec else given.validation
        window, stride = window_sizes(self.chosen, given.length)
        tokens = store.tokens[: None if self.chosen.limit is None else 1 + window + self.chosen.limit * stride].tolist()
        asked = list(islice(sliding_windows(tokens, window, stride), self.chosen.limit))
        whole = sum(one.scored for one in asked) == store.num_tokens - 1
        return TaskRequests(asked, len(asked), lambda scored: figures(scored, store if whole else None))


def figures(scored: Sequence[Score], store: TokenStore | None) -> list[Metric]:
    """Nats a token, e to that, and bits a byte of the store's whole text; without it no bits per byte: a part has no count of bytes."""
    nats, counts = [-one.logprob for one in scored], [float(len(one.logprobs)) for one in scored]
    total, tokens, stderr = math.fsum(nats), sum(counts), statistics.of_ratio(nats, counts)
    loss = total / tokens
    found = [Metric("loss", loss, stderr), Metric("perplexity", perplexity(loss), stderr and stderr * perplexity(loss))]
    if store is not None:
        bits = math.log(2) * store.num_bytes
        found.append(Metric("bits_per_byte", total / bits, stderr and stderr * tokens / bits))
    return found
