"""Scores of given tokens: log-probabilities and greedy choices, against torch on the whole vocabulary."""

import pytest
import torch
import torch.distributed as dist

from models.scoring import token_scores
from parallel.grid import make_grid
from tests.harness import run_ranks

VOCAB, PADDED = 11, 12


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


def scores(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    logits, targets = logits_and_targets()
    grid = make_grid(1, dist.get_world_size())
    own = logits.to(dtype).chunk(grid.tensor, -1)[grid.tensor_rank]
    return token_scores(own, targets, grid.tensor_group, VOCAB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equals_torch_on_the_whole_vocabulary(ranks, dtype):
    logits, targets = logits_and_targets()
    whole = logits[..., :VOCAB].to(dtype)
    expected = whole.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    for logp, greedy in run_ranks(scores, ranks, dtype):
        assert (logp - expected).abs().max() < 1e-5
        assert torch.equal(greedy, whole.argmax(-1) == targets) and greedy[0].all() and not greedy.all()
