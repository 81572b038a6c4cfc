"""Multiple choice by log-likelihood: which of several continuations of a question is the most likely one?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from research.evaluation import examples
from research.evaluation.examples import FileTask, accuracy, continuation
from research.evaluation.scorer import Score
from research.evaluation.task import Metric, TaskContext, TaskRequests

EXAMPLE = '{"query": "Question: Is snow warm?\\nAnswer:", "choices": ["no", "yes"], "gold": 0}'
LENGTHS: dict[str, Callable[[str], int]] = {"acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode("utf-8"))}
"""metric -> what the log-probability of a choice is divided by."""


@dataclass(frozen=True)
class Question:
    """The choices of a question, and the index of the correct one."""

    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class MultipleChoice(FileTask):
    """lm-evaluation-harness' `output_type: multiple_choice`: each choice is scored after the query and a space.

    `acc`: the most likely choice is correct; `acc_norm`: by log-probability per character; `acc_bytes`: per UTF-8 byte.
    """

    def requests(self, context: TaskContext) -> TaskRequests:
        """One request per choice."""
        needs = {"query": str, "choices": list, "gold": int}
        rows = list(islice(examples.rows(self.path, needs, EXAMPLE), self.options.limit))
        questions = [_question(row) for row in rows]
        requests = [
            continuation(context.tokenizer, row.fields["query"], f" {choice}", context.length, row.where)
            for row, question in zip(rows, questions, strict=True)
            for choice in question.choices
        ]
        return TaskRequests(requests, len(rows), lambda scores: metrics_of(scores, questions))


def _question(row: examples.Row) -> Question:
    choices, gold = row.fields["choices"], row.fields["gold"]
    if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise row.mistake("has not two or more choices, texts that are not empty", EXAMPLE)
    if not 0 <= gold < len(choices):
        raise row.mistake(f"has gold = {gold}, but choices 0 to {len(choices) - 1}", EXAMPLE)
    return Question(tuple(choices), gold)


def metrics_of(scores: Sequence[Score], questions: Sequence[Question]) -> list[Metric]:
    """acc, acc_norm and acc_bytes. Of equally likely choices the first counts, as in numpy.argmax."""
    remaining = iter(score.logprob for score in scores)
    logprobs = [[next(remaining) for _ in question.choices] for question in questions]
    metrics = []
    for name, length in LENGTHS.items():
        correct = []
        for question, values in zip(questions, logprobs, strict=True):
            scaled = [value / length(choice) for value, choice in zip(values, question.choices, strict=True)]
            correct.append(float(scaled.index(max(scaled)) == question.gold))
        metrics.append(accuracy(name, correct))
    return metrics
