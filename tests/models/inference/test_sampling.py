"""Processed logits are those of transformers. Draws depend on seed and token number alone, and follow the probabilities."""

import collections

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from models.inference.sampling import Row, drawn, log_probabilities, next_tokens, penalised, uniform, warped
from models.inference.sampling_params import GREEDY, SamplingParams
from parallel.errors import Mistake

VOCAB = 500
CHOICES = [
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.0, top_k=20),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.05),
    SamplingParams(temperature=0.9, top_k=100, top_p=0.9, min_p=0.02),
    SamplingParams(temperature=2.0, top_k=10**6),
    SamplingParams(temperature=1e-3, top_p=0.01),
]


def logits(rows: int = 6, seed: int = 0) -> torch.Tensor:
    """With a tie at the boundary of top-k."""
    found = 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))
    found[0, 7] = found[0].topk(20).values[-1]
    return found


def their_warpers(choice: SamplingParams) -> LogitsProcessorList:
    """In the order of transformers' _get_logits_processor."""
    found = LogitsProcessorList([TemperatureLogitsWarper(choice.temperature)])
    found += [TopKLogitsWarper(choice.top_k)] if choice.top_k else []
    found += [TopPLogitsWarper(choice.top_p)] if choice.top_p < 1 else []
    found += [MinPLogitsWarper(choice.min_p)] if choice.min_p else []
    return found


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_warped_logits_are_transformers_own_to_the_bit(choice):
    given = logits(300)
    found = warped(given, choice)
    assert torch.equal(found, their_warpers(choice)(torch.zeros(300, 1, dtype=torch.int64), given))
    assert torch.equal(given, logits(300))
    assert (found > -torch.inf).any(-1).all()


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_repetition_penalty_is_transformers_own_to_the_bit(penalty):
    seen = torch.randint(0, VOCAB, (6, 40), generator=torch.Generator().manual_seed(1))
    true = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits())
    assert torch.equal(penalised(logits(), [set(row) for row in seen.tolist()], penalty), true)


def test_ids_that_the_logits_lack_are_no_trouble():
    """A prompt may contain ids that the model has and the tokenizer lacks."""
    assert torch.equal(penalised(logits(1), [{VOCAB + 3}], 2.0), logits(1))
    assert torch.equal(penalised(logits(1), [set()], 2.0), logits(1))


def row(choice: SamplingParams, seed: int = 0, written: int = 0) -> Row:
    return Row(choice, seed, [1, 2], [3] * written)


def test_rows_with_different_settings_are_chosen_as_each_alone():
    rows = [row(choice, seed) for seed, choice in enumerate([GREEDY, *CHOICES[:3], SamplingParams(repetition_penalty=5.0), CHOICES[0]])]
    together = next_tokens(logits(), rows)
    assert together == [next_tokens(logits()[i : i + 1], [each])[0] for i, each in enumerate(rows)]
    assert together[0] == int(logits()[0].argmax())


def test_a_draw_depends_on_seed_and_number_alone():
    choice = SamplingParams(temperature=1.0)
    one = [next_tokens(logits(), [row(choice, seed) for seed in range(6)]) for _ in range(2)]
    assert one[0] == one[1]
    swapped = next_tokens(logits().flip(0), [row(choice, seed) for seed in reversed(range(6))])
    assert swapped == one[0][::-1]
    assert one[0] != next_tokens(logits(), [row(choice, seed, written=1) for seed in range(6)])
    assert one[0] != next_tokens(logits(), [row(choice, seed + 6) for seed in range(6)])


def test_draws_are_uniform_and_unrelated():
    """χ² of 20 equal cells over 20,000 numbers, of neighbouring seeds and of neighbouring tokens: 43.8 is its 0.1 % point."""
    for numbers in ([uniform(seed, 5) for seed in range(20_000)], [uniform(5, written) for written in range(20_000)]):
        counts = collections.Counter(int(number * 20) for number in numbers)
        assert set(counts) == set(range(20))
        assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 43.8
        after = torch.corrcoef(torch.tensor([numbers[:-1], numbers[1:]], dtype=torch.float64))[0, 1]
        assert abs(after) < 0.03


def test_drawn_tokens_follow_the_probabilities():
    """χ² over 20,000 draws of seven tokens, one of them impossible: 20.5 is the 0.1 % point of five degrees."""
    given = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, 0.5, -1.0, 0.0]])
    counts = collections.Counter(drawn(given.expand(20_000, -1), [uniform(seed, 0) for seed in range(20_000)]))
    expected = 20_000 * given[0].softmax(-1)
    assert counts[2] == 0
    assert sum((counts[i] - float(n)) ** 2 / float(n) for i, n in enumerate(expected) if n) < 20.5


def test_the_edges_of_a_draw():
    """0 draws the first possible token, the largest number the last possible one."""
    given = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(3, -1)
    assert drawn(given, [0.0, 0.5, 1 - 2**-52]) == [1, 2, 2]
    assert all(0 <= uniform(seed, 0) < 1 and uniform(seed, 0) * 2**52 == int(uniform(seed, 0) * 2**52) for seed in range(100))


def test_a_model_with_nothing_to_say_is_refused():
    with pytest.raises(Mistake, match="logits are not finite → use another checkpoint"):
        next_tokens(torch.full((1, 5), torch.nan), [row(SamplingParams(temperature=1.0))])


def test_log_probabilities_are_the_model_s_own():
    found = log_probabilities(logits(2), [5, 9], 3)
    true = logits(2).log_softmax(-1)
    for i, (token, (own, top)) in enumerate(zip((5, 9), found, strict=True)):
        assert own == float(true[i, token])
        assert top == sorted(((int(j), float(true[i, j])) for j in true[i].topk(3).indices), key=lambda pair: -pair[1])
    assert log_probabilities(logits(1), [0], 0)[0][1] == []
