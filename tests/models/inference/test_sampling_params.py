"""Sampling settings without a meaning or an effect are refused in one sentence."""

import math

import pytest

from models.inference.sampling_params import GREEDY, SamplingParams
from tests.research.helpers.example import sentence


def test_greedy_is_the_default():
    assert SamplingParams().greedy and SamplingParams(0.0, 0, 1.0, 0.0, 1.0) == GREEDY
    assert not SamplingParams(temperature=1e-3).greedy


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(temperature=-1.0), "temperature = -1.0 does not work → use 0 (greedy) or more"),
        (dict(temperature=math.nan), "temperature = nan does not work"),
        (dict(temperature=math.inf), "temperature = inf does not work"),
        (dict(temperature=1.0, top_k=-1), "top_k = -1 does not work → use 1 or more"),
        (dict(temperature=1.0, top_p=0.0), "top_p = 0.0 does not work → use more than 0 and at most 1"),
        (dict(temperature=1.0, top_p=1.1), "top_p = 1.1 does not work"),
        (dict(temperature=1.0, min_p=-0.1), "min_p = -0.1 does not work → use 0"),
        (dict(temperature=1.0, min_p=math.nan), "min_p = nan does not work"),
        (dict(repetition_penalty=0.0), "repetition_penalty = 0.0 does not work → use more than 0"),
        (dict(top_k=5), "top_k = 5 has no effect at temperature = 0, which is greedy → set temperature"),
        (dict(top_p=0.9), "top_p = 0.9 has no effect"),
        (dict(min_p=0.1), "min_p = 0.1 has no effect"),
    ],
)
def test_what_does_not_work_is_said(settings, words):
    assert sentence(lambda: SamplingParams(**settings)).startswith(words)
