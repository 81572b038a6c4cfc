"""The tasks that a run evaluates during training: what is refused before torch, how they are scored, the row of metrics."""

from dataclasses import dataclass, field

import pytest

from research.config import schema, serialization
from research.data.run_tokenizer import load_tokenizer
from research.evaluation import in_training
from research.evaluation.scorer import Score, ScoreRequest
from research.evaluation.task import Metric
from tests.research.helpers import untrained
from tests.research.helpers.example import example, sentence


def experiment(**evaluate):
    return example(evaluate=evaluate)


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"every": 5}, "evaluate.every = 5, but evaluate.tasks is empty → name some"),
        ({"every": 5, "tasks": ("agreemint",)}, "there is no task 'agreemint' → did you mean agreement?"),
        ({"tasks": ("agreemint",)}, "there is no task 'agreemint'"),
        ({"every": 5, "tasks": ("pairs:nowhere.jsonl",)}, "nowhere.jsonl"),
        ({"every": 5, "tasks": ("lambada",)}, "task 'lambada' needs a file"),
        ({"every": 5, "tasks": ("lambada",), "data": "nowhere"}, "nowhere/lambada/test.jsonl does not exist →"),
    ],
)
def test_tasks_that_cannot_be_evaluated_are_refused(evaluate, message, tmp_path):
    assert message in sentence(lambda: in_training.check_tasks(experiment(**evaluate), tmp_path))


def test_tasks_that_can_be_evaluated_are_not(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"sentence_good": "a", "sentence_bad": "b"}\n')
    in_training.check_tasks(experiment(every=5, tasks=("validation", "agreement", "pairs:own.jsonl")), tmp_path)
    in_training.check_tasks(experiment(tasks=("agreement",)), tmp_path)
    in_training.check_tasks(experiment(measure="variant:own"), tmp_path)  # a warning, like tasks without an interval
    in_training.check_tasks(experiment(), tmp_path)


@dataclass
class Even:
    """A scorer for which every token has log p = −1."""

    length: int = 33
    calls: list[int] = field(default_factory=list)

    def score(self, requests: list[ScoreRequest]) -> list[Score]:
        self.calls.append(len(requests))
        return [Score((-1.0,) * request.scored, (True,) * request.scored) for request in requests]


def test_a_task_is_read_once_and_scored_in_one_call(tmp_path):
    """A live scorer forms its batches itself."""
    folder = untrained.make(tmp_path, seq_length=64)
    settings = serialization.load(folder.config)
    settings.evaluate = schema.Evaluate(every=5, tasks=("validation", "agreement"), limit=70)
    first, second = in_training.prepare_tasks(settings, tmp_path, load_tokenizer(settings.data, tmp_path))
    assert (first.requests.examples, second.requests.examples) == (len(first.requests.requests), 70) and len(first.digest) == 64
    assert max(len(one.ids) for one in first.requests.requests) == settings.model.seq_length + 1
    scorer = Even()
    loss, perplexity, *_ = in_training.evaluate_task(first, scorer)
    assert (loss.name, loss.value, perplexity.value) == ("loss", 1.0, pytest.approx(2.718281828))
    in_training.evaluate_task(second, scorer)
    assert scorer.calls == [len(first.requests.requests), len(second.requests.requests)]
    settings.evaluate.every = 0
    assert in_training.prepare_tasks(settings, tmp_path, load_tokenizer(settings.data, tmp_path)) == []


def test_the_keys_of_a_row(tmp_path):
    (task,) = in_training.create_tasks(experiment(tasks=("agreement",)), tmp_path)
    metrics = [Metric("accuracy", 0.5, 0.1, True), Metric("loss", 2.0, None)]
    assert in_training.metrics_row(in_training.PreparedTask(task, None, ""), metrics) == {
        "eval/agreement/accuracy": 0.5, "eval/agreement/accuracy_stderr": 0.1, "eval/agreement/loss": 2.0,
    }  # fmt: skip
