"""Scores of whole texts in padded batches, on one rank and with a driver and workers, against the plain module on one text at a time."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from models.config import GPT
from models.inference.driver import DriverScorer, run_worker
from models.inference.scoring import TokenScorer, token_scores
from parallel.grid import make_grid
from parallel.layers import PlainModule
from tests.harness import run_ranks
from tests.models.helpers.build import ALONE, tensor_grid
from tests.models.helpers.decoding import filled, longer

ROWS = [[5, 9], list(range(24)), [7, 2, 80, 41, 41, 3, 9], [60, 61, 62], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
COUNTS = [1, 23, 3, 2, 1]


def models() -> list[GPT]:
    """With shared kv heads, a padded vocabulary and several position schemes."""
    rows = [("learned", 4, "pre_norm"), ("rotary", 2, "parallel"), ("alibi", 2, "post_norm"), ("none", 1, "pre_norm")]
    return [longer(position=p, num_kv_heads=k, residual=r, tied=k == 4) for p, k, r in rows]


def dense(module: PlainModule, model: GPT) -> list[tuple[float, bool]]:
    """Every scored token by torch's softmax over the whole vocabulary. Each text is run by itself, including its last token."""
    found = []
    for row, count in zip(ROWS, COUNTS, strict=True):
        with torch.no_grad():
            logits = module(torch.tensor([row]))[0, :, : model.vocab_size].double()
        for at in range(len(row) - count, len(row)):
            found.append((float(logits[at - 1].log_softmax(-1)[row[at]]), int(logits[at - 1].argmax()) == row[at]))
    return found


def scored_by_driver(jobs: list[tuple[GPT, list, list]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The scores of each job from the driver on tensor rank 0; an empty list on the other ranks, which are workers."""
    grid, found = tensor_grid(), []
    for model, rows, counts in jobs:
        if grid.rank > 0:
            run_worker(TokenScorer(filled(model, grid), model, grid))
            continue
        driver = DriverScorer(filled(model, grid), model, grid)
        found.append(arrays(driver.score(rows, counts)))
        driver.score(rows[:1], counts[:1])
        driver.release()
    return found


def arrays(scores: tuple[torch.Tensor, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    return scores[0].numpy(), scores[1].numpy()


def with_greedy(module: PlainModule, model: GPT) -> tuple[list, list]:
    """ROWS and one more, which ends in the model's most likely token, so that not all greedy flags are False."""
    with torch.no_grad():
        likeliest = int(module(torch.tensor([ROWS[-1]]))[0, -1, : model.vocab_size].argmax())
    return [*ROWS, [*ROWS[-1], likeliest]], [*COUNTS, 1]


@pytest.mark.parametrize("model", models(), ids=lambda model: model.position)
@pytest.mark.parametrize("at_once", [5, 1024])
def test_a_batch_is_each_text_by_itself(model, at_once):
    module = filled(model)
    expected = dense(module, model)
    rows, counts = with_greedy(module, model)
    logp, greedy = TokenScorer(module, model, ALONE, at_once).score(rows, counts)
    assert logp.shape == greedy.shape == (sum(counts),) and logp.dtype == torch.float32
    assert (logp[:-1].double() - torch.tensor([one for one, _ in expected])).abs().max() < 1e-5
    assert greedy.tolist() == [*(flag for _, flag in expected), True]


@pytest.mark.parametrize("tensor", [2, 4])
def test_tensor_ranks_score_what_one_scores(tensor):
    jobs: list[Any] = []
    alone = []
    for model in models():
        module = filled(model)
        rows, counts = with_greedy(module, model)
        jobs.append((model, rows, counts))
        alone.append(arrays(TokenScorer(module, model, ALONE).score(rows, counts)))
    first, *others = run_ranks(scored_by_driver, tensor, jobs)
    assert others == [[]] * (tensor - 1)
    for (logp, greedy), (ours, flags) in zip(first, alone, strict=True):
        assert np.abs(logp - ours).max() < 1e-5 and (greedy == flags).all() and greedy[-1]


def test_bf16_is_scored_in_fp32():
    model = models()[0]
    logp, _ = TokenScorer(filled(model, dtype=torch.bfloat16), model, ALONE).score(ROWS, COUNTS)
    exact, _ = TokenScorer(filled(model), model, ALONE).score(ROWS, COUNTS)
    assert logp.dtype == torch.float32 and 0 < (logp - exact).abs().mean() < 0.1


VOCAB, PADDED = 11, 12
"""Of the logits below."""


def logits_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    """'2 5 12', the last column of which is padding and would win everywhere; several largest logits in one row."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 5, PADDED, generator=generator) * 3
    logits[..., VOCAB:] = 1e4
    logits[0, 1, [2, 7, 9]] = 50.0
    targets = torch.randint(0, VOCAB, (2, 5), generator=generator)
    targets[0] = logits[0, :, :VOCAB].argmax(-1)
    targets[1, 2] = VOCAB - 1
    return logits, targets


def scored_on_ranks(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    logits, targets = logits_and_targets()
    grid = make_grid(1, dist.get_world_size())
    own = logits.to(dtype).chunk(grid.tensor, -1)[grid.tensor_rank]
    return token_scores(own, targets, grid.tensor_group, VOCAB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_token_scores_are_torch_s_on_the_whole_vocabulary(ranks, dtype):
    logits, targets = logits_and_targets()
    whole = logits[..., :VOCAB].to(dtype)
    expected = whole.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    for logp, greedy in run_ranks(scored_on_ranks, ranks, dtype):
        assert (logp - expected).abs().max() < 1e-5
        assert torch.equal(greedy, whole.argmax(-1) == targets) and greedy[0].all() and not greedy.all()
