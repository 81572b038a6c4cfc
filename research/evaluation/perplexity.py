"""Perplexity and bits per byte of running text: the run's own validation split, or any file that could be a corpus of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from research.data import corpus
from research.data.store import TokenStore
from research.evaluation import errors, windows
from research.evaluation.task import Exam, Given, Metric, Settings
from research.metrics import perplexity
from research.scorer import Scored


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

    def digest(self, given: Given) -> str:
        """Of the text as stored, and of the way it is read."""
        return corpus.digest(self.spec or given.data.validation, given.root)

    def exam(self, given: Given) -> Exam:
        """A request a window."""
        store = given.split(self.spec) if self.spec else given.validation
        window, stride = windows.sizes(self.chosen, given.length)
        tokens = store.tokens[: None if self.chosen.limit is None else 1 + window + self.chosen.limit * stride].tolist()
        asked = list(islice(windows.sliding(tokens, window, stride), self.chosen.limit))
        whole = sum(one.scored for one in asked) == store.num_tokens - 1
        return Exam(asked, len(asked), lambda scored: figures(scored, store if whole else None))


def figures(scored: Sequence[Scored], store: TokenStore | None) -> list[Metric]:
    """Nats a token, e to that, and bits a byte of the store's whole text; without it no bits per byte: a part has no count of bytes."""
    nats, counts = [-one.logprob for one in scored], [float(len(one.logprobs)) for one in scored]
    total, tokens, stderr = math.fsum(nats), sum(counts), errors.of_ratio(nats, counts)
    loss = total / tokens
    found = [Metric("loss", loss, stderr), Metric("perplexity", perplexity(loss), stderr and stderr * perplexity(loss))]
    if store is not None:
        bits = math.log(2) * store.num_bytes
        found.append(Metric("bits_per_byte", total / bits, stderr and stderr * tokens / bits))
    return found
