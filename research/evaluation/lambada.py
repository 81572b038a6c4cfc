"""LAMBADA: the last word of a passage that is easy with the whole of it and hard with its last sentence (arXiv:1606.06031)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from research.evaluation import examples, statistics
from research.evaluation.examples import FileTask, continuation
from research.evaluation.scorer import Score, ScoreRequest
from research.evaluation.task import Metric, TaskContext, TaskRequests
from research.tracking.metrics import perplexity

EXAMPLE = '{"text": "a passage of several words"}'


@dataclass(frozen=True)
class Lambada(FileTask):
    """lm-evaluation-harness' `lambada_openai`: what follows the last space, the space included, after all before it.

    accuracy: all its tokens are the likeliest ones; perplexity: e to the mean of −log p(word), a word counted once.
    """

    def exam(self, given: TaskContext) -> TaskRequests:
        """A request a passage."""
        rows = islice(examples.rows(self.path, {"text": str}, EXAMPLE), self.chosen.limit)
        asked = [_asked(row, given) for row in rows]
        return TaskRequests(asked, len(asked), figures)


def _asked(row: examples.Row, given: TaskContext) -> ScoreRequest:
    context, space, word = row.fields["text"].rpartition(" ")
    if not space or not word:
        raise row.refuse("has no last word after a space", EXAMPLE)
    return continuation(given.tokenizer, context, space + word, given.length, row.where)


def figures(scored: Sequence[Score]) -> list[Metric]:
    """Accuracy and perplexity of the last words."""
    right, nats = [float(all(one.greedy)) for one in scored], [-one.logprob for one in scored]
    ppl, stderr = perplexity(statistics.mean(nats)), statistics.of_mean(nats)
    accuracy = Metric("accuracy", statistics.mean(right), statistics.of_mean(right), higher_is_better=True)
    return [accuracy, Metric("perplexity", ppl, stderr and math.isfinite(ppl) and stderr * ppl or None)]
