"""The scores of a restored model: batches are bounded, scores are in the order of the requests, tensor ranks agree."""

from pathlib import Path

import pytest
import torch

from models.config import GPT
from parallel.grid import Grid
from research.cluster.tensor_ranks import opened
from research.config import serialization
from research.data.run_tokenizer import load_tokenizer
from research.evaluation.scorer import Score, ScoreRequest
from research.evaluation.session import RestoredScorer, Session, batches
from research.generation.restore import DecoderSpec, ScorerSpec, restored
from tests.research.helpers import untrained

REQUESTS = [ScoreRequest(tuple(range(3, 3 + n)), scored) for n, scored in ((2, 1), (33, 32), (7, 1), (33, 1), (12, 11), (7, 6))]


def scores_of(folder, tensor: int, batch: int, precision: str | None = None) -> list[Score]:
    spec = ScorerSpec(folder.path, folder.checkpoints / "step_000003", precision)
    with opened(spec, tensor) as scores:
        return RestoredScorer(scores, 33, batch).score(REQUESTS)


def dense(folder, precision: str | None = None) -> list[list[float]]:
    module = restored(DecoderSpec(folder.path, folder.checkpoints / "step_000003", precision), Grid())
    model = GPT(**serialization.load(folder.config).model.model_dump())
    expected = []
    for request in REQUESTS:
        ids, count = request.ids, len(request.ids) - 1
        with torch.no_grad():
            logprobs = module(torch.tensor([ids[:-1]]))[0, :, : model.vocab_size].double().log_softmax(-1)
        expected.append([float(logprobs[i, ids[i + 1]]) for i in range(count - request.scored, count)])
    return expected


def largest_difference(ours: list[Score], expected: list[list[float]]) -> float:
    assert [len(one.logprobs) for one in ours] == [one.scored for one in REQUESTS]
    return max(abs(a - b) for one, other in zip(ours, expected, strict=True) for a, b in zip(one.logprobs, other, strict=True))


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_scores_are_in_order_for_every_batch_size(folder, batch):
    assert largest_difference(scores_of(folder, 1, batch), dense(folder)) < 1e-5


def test_two_tensor_ranks_give_the_same_scores(folder):
    one, two = scores_of(folder, 1, 2), scores_of(folder, 2, 2)
    assert largest_difference(two, dense(folder)) < 1e-5 and [a.greedy for a in one] == [a.greedy for a in two]


def test_bf16(folder):
    assert 1e-5 < largest_difference(scores_of(folder, 1, 2, "bf16"), dense(folder)) < 0.3


def test_batches_are_bounded_and_hold_all():
    lengths = [3, 33, 7, 33, 12, 7, 1, 1, 1]
    split = list(batches(lengths, 66))
    assert sorted(i for batch in split for i in batch) == list(range(9))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 66 for batch in split)
    assert split == [[1, 3], [4, 2, 5, 0, 6], [7, 8]]
    assert [len(batch) for batch in batches([50, 40, 2], 10)] == [1, 1, 1]  # one that is too long goes alone
    assert list(batches([], 10)) == []


WINDOW = """from tests.models.helpers import undecodable

class WindowBlock(undecodable.WindowBlock):
    pass
"""


def test_a_generator_without_a_cache_says_so_once(tmp_path: Path):
    run, lines = untrained.make(tmp_path, variant=WINDOW, residual="variant:WindowBlock"), list[str]()
    experiment = serialization.load(run.config)
    model, tokenizer = GPT(**experiment.model.model_dump()), load_tokenizer(experiment.data, tmp_path)
    with Session(run.path, run.checkpoints / "step_000003", model, tokenizer, None, 1, 2, lines.append) as session:
        assert session.generator is session.generator
    assert len(lines) == 1 and lines[0].startswith("no KV cache")


def test_a_scorer_is_the_same_object_for_a_task(tmp_path: Path, folder):
    spec = ScorerSpec(folder.path, folder.checkpoints / "step_000003")
    with opened(spec, 1) as scores:
        assert RestoredScorer(scores, 33, 2).length == 33 and RestoredScorer(scores, 33, 2).score([]) == []
