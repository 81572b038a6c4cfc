"""Which tasks a run puts to its model, what is refused before torch, and the row that comes of it."""

from dataclasses import dataclass, field

import pytest

from research.data.prepare import load_tokenizer
from research.evaluation import in_training
from research.evaluation.scorer import Score, ScoreRequest
from research.evaluation.task import Metric
from tests.research.helpers import untrained
from tests.research.helpers.example import example, sentence


def asking(**evaluate):
    return example(evaluate=evaluate)


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ({"every": 5}, "evaluate.every = 5, but evaluate.tasks is empty → name some"),
        ({"every": 5, "tasks": ("agreemint",)}, "there is no task 'agreemint' → did you mean agreement?"),
        ({"tasks": ("agreemint",)}, "there is no task 'agreemint'"),
        ({"every": 5, "tasks": ("pairs:nowhere.jsonl",)}, "nowhere.jsonl"),
        ({"every": 5, "tasks": ("lambada",)}, "task 'lambada' needs a file"),
        ({"every": 5, "tasks": ("lambada",), "data": "nowhere"}, "nowhere/lambada/test.jsonl does not exist →"),
    ],
)
def test_what_cannot_be_asked_is_refused(evaluate, said, tmp_path):
    assert said in sentence(lambda: in_training.check_tasks(asking(**evaluate), tmp_path))


def test_what_can_be_asked_is_not(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"sentence_good": "a", "sentence_bad": "b"}\n')
    in_training.check_tasks(asking(every=5, tasks=("validation", "agreement", "pairs:own.jsonl")), tmp_path)
    in_training.check_tasks(asking(tasks=("agreement",)), tmp_path)
    in_training.check_tasks(asking(), tmp_path)


@dataclass
class Even:
    """A scorer for which every token has log p = −1."""

    length: int = 33
    asked: list[int] = field(default_factory=list)

    def score(self, asked: list[ScoreRequest]) -> list[Score]:
        self.asked.append(len(asked))
        return [Score((-1.0,) * one.scored, (True,) * one.scored) for one in asked]


def test_a_task_is_read_once_and_asked_at_one_go(tmp_path):
    """One call of the scorer for all examples: a live one fills its batches itself."""
    from research.config import schema, serialization

    folder = untrained.make(tmp_path, seq_length=64)
    experiment = serialization.load(folder.config)
    experiment.evaluate = schema.Evaluate(every=5, tasks=("validation", "agreement"), limit=70)
    first, second = in_training.prepare_tasks(experiment, tmp_path, load_tokenizer(experiment.data, tmp_path))
    assert (first.exam.examples, second.exam.examples) == (len(first.exam.asked), 70) and len(first.digest) == 64
    assert max(len(one.ids) for one in first.exam.asked) == experiment.model.seq_length + 1
    scorer = Even()
    loss, perplexity, *_ = in_training.evaluate_task(first, scorer)
    assert (loss.name, loss.value, perplexity.value) == ("loss", 1.0, pytest.approx(2.718281828))
    in_training.evaluate_task(second, scorer)
    assert scorer.asked == [len(first.exam.asked), len(second.exam.asked)]
    experiment.evaluate.every = 0
    assert in_training.prepare_tasks(experiment, tmp_path, load_tokenizer(experiment.data, tmp_path)) == []


def test_the_keys_of_a_row(tmp_path):
    (found,) = [in_training.PreparedTask(task, None, "") for task in in_training.chosen(asking(tasks=("agreement",)), tmp_path)]
    figures = [Metric("accuracy", 0.5, 0.1, True), Metric("loss", 2.0, None)]
    assert in_training.metrics_row(found, figures) == {
        "eval/agreement/accuracy": 0.5, "eval/agreement/accuracy_stderr": 0.1, "eval/agreement/loss": 2.0,
    }  # fmt: skip
