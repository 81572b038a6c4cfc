"""A restored model's scores: in batches that are bounded, in the order of the requests, on any number of ranks."""

from pathlib import Path

import pytest
import torch

from models.config import GPT
from parallel.grid import Grid
from research.cluster.tensor_ranks import opened
from research.config import serialization
from research.evaluation.scorer import Score, ScoreRequest
from research.evaluation.session import RestoredScorer, batches
from research.generation.restore import DecoderSpec, ScorerSpec, restored
from tests.research.helpers import untrained

ASKED = [ScoreRequest(tuple(range(3, 3 + n)), scored) for n, scored in ((2, 1), (33, 32), (7, 1), (33, 1), (12, 11), (7, 6))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return untrained.make(tmp_path_factory.mktemp("scorer"))


def answers(folder, tensor: int, batch: int, precision: str | None = None) -> list[Score]:
    plan = ScorerSpec(folder.path, folder.checkpoints / "step_000003", precision)
    with opened(plan, tensor) as scores:
        return RestoredScorer(scores, 33, batch).score(ASKED)


def dense(folder, precision: str | None = None) -> list[list[float]]:
    module = restored(DecoderSpec(folder.path, folder.checkpoints / "step_000003", precision), Grid())
    model = GPT(**serialization.load(folder.config).model.model_dump())
    found = []
    for one in ASKED:
        with torch.no_grad():
            told = module(torch.tensor([one.ids[:-1]]))[0, :, : model.vocab_size].double().log_softmax(-1)
        found.append([float(told[at, one.ids[at + 1]]) for at in range(len(one.ids) - 1 - one.scored, len(one.ids) - 1)])
    return found


def far(ours: list[Score], expected: list[list[float]]) -> float:
    assert [len(one.logprobs) for one in ours] == [one.scored for one in ASKED]
    return max(abs(a - b) for one, other in zip(ours, expected, strict=True) for a, b in zip(one.logprobs, other, strict=True))


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_answers_are_in_order_whatever_the_batch(folder, batch):
    assert far(answers(folder, 1, batch), dense(folder)) < 1e-5


def test_two_tensor_ranks_say_the_same(folder):
    one, two = answers(folder, 1, 2), answers(folder, 2, 2)
    assert far(two, dense(folder)) < 1e-5 and [a.greedy for a in one] == [a.greedy for a in two]


def test_bf16(folder):
    assert 1e-5 < far(answers(folder, 1, 2, "bf16"), dense(folder)) < 0.3


def test_batches_are_bounded_and_hold_all():
    lengths = [3, 33, 7, 33, 12, 7, 1, 1, 1]
    found = list(batches(lengths, 66))
    assert sorted(place for batch in found for place in batch) == list(range(9))
    assert all(len(batch) * max(lengths[place] for place in batch) <= 66 for batch in found)
    assert found == [[1, 3], [4, 2, 5, 0, 6], [7, 8]]
    assert [len(batch) for batch in batches([50, 40, 2], 10)] == [1, 1, 1]  # one that is too long goes alone
    assert list(batches([], 10)) == []


def test_a_scorer_is_the_same_object_for_a_task(tmp_path: Path, folder):
    plan = ScorerSpec(folder.path, folder.checkpoints / "step_000003")
    with opened(plan, 1) as scores:
        assert RestoredScorer(scores, 33, 2).length == 33 and RestoredScorer(scores, 33, 2).score([]) == []
