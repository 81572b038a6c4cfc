"""Minimal pairs: is a grammatical sentence more likely than one that differs from it in one point and is ungrammatical?"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from research.evaluation import examples
from research.evaluation.examples import FileTask, accuracy, continuation
from research.evaluation.scorer import Score
from research.evaluation.task import Metric, TaskContext, TaskRequests

EXAMPLE = '{"sentence_good": "The cats sleep.", "sentence_bad": "The cats sleeps."}'
PARADIGM = "UID"


@dataclass(frozen=True)
class MinimalPairs(FileTask):
    """BLiMP's own files (arXiv:1912.00582), or any file with their two fields; the field "UID" names a line's paradigm.

    A whole sentence is scored, with a space before it, after end-of-text, as in lm-evaluation-harness' `blimp_…`, whose `acc` is
    `accuracy` here. If a file has several paradigms, `accuracy/UID` is the accuracy of each.
    """

    def requests(self, context: TaskContext) -> TaskRequests:
        """Two requests per pair."""
        needs = {"sentence_good": str, "sentence_bad": str}
        rows = list(islice(examples.rows(self.path, needs, EXAMPLE), self.options.limit))
        requests = [
            continuation(context.tokenizer, "", f" {row.fields[name]}", context.length, row.where) for row in rows for name in needs
        ]
        paradigms = [str(row.fields.get(PARADIGM, "")) for row in rows]
        return TaskRequests(requests, len(rows), lambda scores: metrics_of(scores, paradigms))


def metrics_of(scores: Sequence[Score], paradigms: Sequence[str]) -> list[Metric]:
    """accuracy over all pairs, then per paradigm. If both sentences are equally likely, the good one counts, as in an argmax."""
    correct = [float(good.logprob >= bad.logprob) for good, bad in zip(scores[::2], scores[1::2], strict=True)]
    metrics = [accuracy("accuracy", correct)]
    if len(set(paradigms)) > 1:
        for name in dict.fromkeys(paradigms):
            members = [value for value, paradigm in zip(correct, paradigms, strict=True) if paradigm == name]
            metrics.append(accuracy(f"accuracy/{name}", members))
    return metrics
