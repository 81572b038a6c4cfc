"""LAMBADA (arXiv:1606.06031): the last word of a passage, which is easy to predict from the whole passage, and hard from one sentence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from research.evaluation import examples, statistics
from research.evaluation.examples import FileTask, accuracy, continuation
from research.evaluation.scorer import Score
from research.evaluation.task import Metric, TaskContext, TaskRequests
from research.tracking.metrics import perplexity

EXAMPLE = '{"text": "a passage of several words"}'


@dataclass(frozen=True)
class Lambada(FileTask):
    """lm-evaluation-harness' `lambada_openai`: scores the last space and what follows it, given everything before.

    accuracy: all tokens of the last word are the most likely ones. perplexity: e to the mean over passages of −log p(last word).
    """

    def requests(self, context: TaskContext) -> TaskRequests:
        """One request per passage."""
        requests = []
        for row in islice(examples.rows(self.path, {"text": str}, EXAMPLE), self.options.limit):
            passage, space, word = row.fields["text"].rpartition(" ")
            if not space or not word:
                raise row.mistake("has no last word after a space", EXAMPLE)
            requests.append(continuation(context.tokenizer, passage, space + word, context.length, row.where))
        return TaskRequests(requests, len(requests), metrics_of)


def metrics_of(scores: Sequence[Score]) -> list[Metric]:
    """accuracy and perplexity of the last words."""
    correct, nats = [float(all(score.greedy)) for score in scores], [-score.logprob for score in scores]
    value, stderr = perplexity(statistics.mean(nats)), statistics.of_mean(nats)
    return [accuracy("accuracy", correct), Metric("perplexity", value, stderr and math.isfinite(value) and stderr * value or None)]
