"""What a run lets its model write: choices and prompts that are refused before torch, and those that can only be refused later."""

import pytest

from models.inference.sampling_params import SamplingParams
from research.config import schema, serialization
from research.data.run_tokenizer import load_tokenizer
from research.training import samples
from tests.research.helpers import untrained
from tests.research.helpers.example import example, sentence


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ({"top_k": 5}, "sample.top_k = 5 has no effect at temperature = 0"),
        ({"every": 5, "prompts": ("a",), "tokens": 128}, "sample.tokens = 128 leaves no room for a prompt in model.seq_length = 128"),
        ({"prompts": ("\udcff",)}, "is not UTF-8"),
        ({"every": 5, "prompts": ("a", "one two three four five"), "tokens": 124}, "'one two three four five' has 5 tokens"),
    ],
)
def test_what_cannot_be_written_is_refused(sample, said, tmp_path):
    """The last with a tokenizer that need not be trained."""
    experiment = example(sample=sample, model={"vocab_size": 50257})
    experiment.data.tokenizer = "builtin:gpt2"
    assert said in sentence(lambda: samples.check_samples(experiment, tmp_path))


def test_what_can_be_written_is_not_and_a_tokenizer_is_not_trained_for_it(tmp_path):
    samples.check_samples(example(sample={"prompts": ("word " * 500,), "tokens": 1000}), tmp_path)  # never written
    samples.check_samples(example(sample={"every": 1, "tokens": 1000}), tmp_path)  # as many as there is room for
    samples.check_samples(example(sample={"every": 1, "prompts": ("word " * 500,)}), tmp_path)  # who could know
    assert list(tmp_path.iterdir()) == []


def test_a_long_prompt_is_refused_once_the_tokenizer_is_known(tmp_path):
    experiment = serialization.load(untrained.make(tmp_path).config)
    experiment.sample = schema.Sample(every=1, prompts=("peace", "war " * 9), tokens=25)
    tokenizer = load_tokenizer(experiment.data, tmp_path)
    size = len(tokenizer.encode("war " * 9))
    said = sentence(lambda: samples.refuse_long(experiment, experiment.sample.prompts, tokenizer))
    assert f"has {size} tokens, with sample.tokens = 25 that is {size + 25}, more than model.seq_length = 32" in said
    assert f"use sample.tokens {32 - size} or less" in said
    experiment.sample.tokens = 32 - size
    samples.refuse_long(experiment, experiment.sample.prompts, tokenizer)


def test_the_choice_is_generates(tmp_path):
    asked = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    assert samples.sampling_params_of(example(sample=asked)) == SamplingParams(**asked)
    assert samples.sampling_params_of(example()) == SamplingParams()
