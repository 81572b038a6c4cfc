"""Multiple choice by likelihood: of several ways to go on, which does the model find likeliest?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from research.evaluation import examples
from research.evaluation.examples import FileTask, continuation
from research.evaluation.minimal_pairs import accuracy
from research.evaluation.scorer import Score
from research.evaluation.task import Metric, TaskContext, TaskRequests

EXAMPLE = '{"query": "Question: Is snow warm?\\nAnswer:", "choices": ["no", "yes"], "gold": 0}'


@dataclass(frozen=True)
class Question:
    """What may follow, and which of it is right."""

    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class MultipleChoice(FileTask):
    """lm-evaluation-harness' `output_type: multiple_choice`: each choice after the query and a space.

    `acc`: the likeliest is right; `acc_norm`: by log-probability per character; `acc_bytes`: per UTF-8 byte.
    """

    def exam(self, given: TaskContext) -> TaskRequests:
        """A request a choice."""
        rows = list(islice(examples.rows(self.path, {"query": str, "choices": list, "gold": int}, EXAMPLE), self.chosen.limit))
        questions = [_question(row) for row in rows]
        pairs = [(row, choice) for row, question in zip(rows, questions, strict=True) for choice in question.choices]
        asked = [continuation(given.tokenizer, row.fields["query"], f" {choice}", given.length, row.where) for row, choice in pairs]
        return TaskRequests(asked, len(rows), lambda scored: figures(scored, questions))


def _question(row: examples.Row) -> Question:
    choices, gold = row.fields["choices"], row.fields["gold"]
    if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise row.refuse("has not two or more choices, texts that are not empty", EXAMPLE)
    if not 0 <= gold < len(choices):
        raise row.refuse(f"has gold = {gold}, but choices 0 to {len(choices) - 1}", EXAMPLE)
    return Question(tuple(choices), gold)


LENGTHS: dict[str, Callable[[str], int]] = {"acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode("utf-8"))}
"""What a choice's log-probability is divided by."""


def figures(scored: Sequence[Score], questions: Sequence[Question]) -> list[Metric]:
    """Of equally good choices the first counts, as in numpy.argmax."""
    logprobs = iter(one.logprob for one in scored)
    told = [[next(logprobs) for _ in question.choices] for question in questions]
    return [
        accuracy(name, [float(_best(question, found, length) == question.gold) for question, found in zip(questions, told, strict=True)])
        for name, length in LENGTHS.items()
    ]


def _best(question: Question, logprobs: Sequence[float], length: Callable[[str], int]) -> int:
    scores = [logprob / length(choice) for logprob, choice in zip(logprobs, question.choices, strict=True)]
    return scores.index(max(scores))
