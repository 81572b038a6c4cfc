"""Minimal pairs: does the model find the sentence that is right more likely than the one that differs from it in one point and is wrong?"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from research.evaluation import examples, statistics
from research.evaluation.examples import FileTask, continuation
from research.evaluation.scorer import Score, ScoreRequest
from research.evaluation.task import Metric, TaskContext, TaskRequests

EXAMPLE = '{"sentence_good": "The cats sleep.", "sentence_bad": "The cats sleeps."}'
PARADIGM = "UID"


@dataclass(frozen=True)
class MinimalPairs(FileTask):
    """BLiMP's files as they are (arXiv:1912.00582), or any with its two fields; a field "UID" names a line's paradigm.

    A sentence is scored whole, with a space before it, after end-of-text: so does lm-evaluation-harness' `blimp_…`, whose `acc` is
    `accuracy`; where several paradigms are in one file, `accuracy/UID` is each one's.
    """

    def exam(self, given: TaskContext) -> TaskRequests:
        """Two requests a pair."""
        needs = {"sentence_good": str, "sentence_bad": str}
        rows = list(islice(examples.rows(self.path, needs, EXAMPLE), self.chosen.limit))
        asked = [_sentence(row, name, given) for row in rows for name in needs]
        paradigms = [str(row.fields.get(PARADIGM, "")) for row in rows]
        return TaskRequests(asked, len(rows), lambda scored: figures(scored, paradigms))


def _sentence(row: examples.Row, name: str, given: TaskContext) -> ScoreRequest:
    return continuation(given.tokenizer, "", f" {row.fields[name]}", given.length, row.where)


def figures(scored: Sequence[Score], paradigms: Sequence[str]) -> list[Metric]:
    """Accuracy over all pairs, then by paradigm. Of equally likely sentences the good one counts, as in an argmax."""
    right = [float(good.logprob >= bad.logprob) for good, bad in zip(scored[::2], scored[1::2], strict=True)]
    found = [accuracy("accuracy", right)]
    if len(set(paradigms)) > 1:
        for name in dict.fromkeys(paradigms):
            found.append(accuracy(f"accuracy/{name}", [one for one, other in zip(right, paradigms, strict=True) if other == name]))
    return found


def accuracy(name: str, right: Sequence[float]) -> Metric:
    """Of zeros and ones."""
    return Metric(name, statistics.mean(right), statistics.of_mean(right), higher_is_better=True)
