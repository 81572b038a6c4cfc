"""Generation settings that cannot work are refused in one sentence."""

import pytest

from models.inference.sampling_params import SamplingParams
from research.generation.settings import GenerationSettings, refuse_context, refuse_long, text_seed
from tests.models.helpers.build import shape
from tests.research.helpers.example import sentence


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(max_new_tokens=0), "max_new_tokens = 0 does not work → use 1 or more"),
        (dict(stops=("a", "")), "a stop string is empty"),
        (dict(logprobs=-1), "logprobs = -1 does not work → use 0"),
        (dict(logprobs=101), "logprobs = 101 does not work → use 0 (the written token alone) to 100"),
    ],
)
def test_what_does_not_work_is_said(settings, words):
    assert sentence(lambda: GenerationSettings(**settings)).startswith(words)


def test_a_text_that_does_not_fit_is_refused_with_both_numbers():
    learned, rotary = shape(), shape(position="rotary")
    refuse_long(8, 8, 16, learned)
    message = sentence(lambda: refuse_long(8, 9, 16, learned))
    assert message == (
        "a prompt of 8 tokens with max_new_tokens = 9 needs 17 places, the context has 16 and does not slide → use max_new_tokens 8 or less"
    )
    assert sentence(lambda: refuse_long(8, 9, 16, rotary)).endswith("→ use max_new_tokens 8 or less, or use context 17")
    assert sentence(lambda: refuse_long(16, 1, 16, learned)).endswith("→ shorten the prompt")


def test_a_context_longer_than_the_learned_positions_is_refused():
    refuse_context(16, shape())
    refuse_context(400, shape(position="alibi"))
    assert "context = 17 is longer than the positions learned, model.seq_length = 16" in sentence(lambda: refuse_context(17, shape()))
    assert "context = 17 is longer" in sentence(lambda: refuse_context(17, shape(position="variant:Own")))
    assert "context = 1 does not work" in sentence(lambda: refuse_context(1, shape()))


def test_seeds_of_texts_differ():
    seeds = {text_seed(seed, prompt, text) for seed in range(5) for prompt in range(5) for text in range(5)}
    assert len(seeds) == 125 and text_seed(1, 2, 3) == text_seed(1, 2, 3)
    assert GenerationSettings(sampling=SamplingParams(temperature=1.0)).seed == 0
