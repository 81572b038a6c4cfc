"""The certificate against closed forms: distributions whose divergence and perplexity can be written down, and what must never pass."""

import json
import math
from dataclasses import replace

import pytest
import torch

from parallel.errors import Mistake
from research.data import tokenizer
from research.exchange.parity import BOUND, TOKENS, WINDOW, Certificate, certify, sample_ids

IDS = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])


def constant(*probabilities: float):
    """A model that always predicts these."""
    logits = torch.tensor(probabilities).log()
    return lambda: lambda ids: logits.expand(*ids.shape, -1)


def random(seed: int = 0, vocab: int = 7, scale: float = 1.0):
    """A model of fixed random logits, which differ from place to place."""
    return lambda: lambda ids: scale * torch.randn(*ids.shape, vocab, generator=torch.Generator().manual_seed(seed))


def changed(make, change):
    return lambda: lambda ids: change(make()(ids))


def test_divergence_and_perplexity_are_the_closed_forms():
    """Theirs ¼, ¾; ours ½, ½; of the six tokens that follow another one, five are the second: p = ¾."""
    found = certify(IDS, constant(0.25, 0.75), constant(0.5, 0.5))
    assert found.kl == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-6)
    assert found.perplexity_ours == pytest.approx(2.0, rel=1e-6)
    assert found.perplexity_theirs == pytest.approx((0.75**5 * 0.25) ** (-1 / 6), rel=1e-6)
    assert found.largest_difference == pytest.approx(math.log(2), rel=1e-6)
    assert found.largest_logit == pytest.approx(math.log(4), rel=1e-6)
    assert (found.tokens, found.relative, found.passed) == (8, pytest.approx(0.5, rel=1e-6), False)


def test_divergence_is_of_ours_from_theirs_and_not_the_other_way():
    """Σ p log(p/q), p theirs: a token that ours thinks impossible costs without bound."""
    one, other = constant(0.5, 0.5), constant(1 - 1e-6, 1e-6)
    assert certify(IDS, one, other).kl == pytest.approx(0.5 * math.log(0.25e6), rel=1e-3)
    assert certify(IDS, other, one).kl == pytest.approx(math.log(2), rel=1e-3)


def test_equal_uniform_models_are_as_perplexed_as_there_are_tokens():
    found = certify(IDS, constant(*[0.2] * 5), constant(*[0.2] * 5))
    assert (found.relative, found.kl) == (0, 0) and found.passed
    assert found.perplexity_ours == found.perplexity_theirs == pytest.approx(5.0, rel=1e-6)


@pytest.mark.parametrize(("relative", "passes"), [(0.9 * BOUND, True), (1.1 * BOUND, False)])
def test_the_bound_is_of_one_logit_anywhere_relative_to_the_largest(relative, passes):
    """In the last window, at a token that hardly weighs: a mean would not see it."""
    theirs = random(scale=30)
    largest = theirs()(IDS[:1]).abs().max()

    def spoiled(ids):
        logits = theirs()(ids)
        logits[0, 2, logits[0, 2].argmin()] += relative * largest * (ids[0, 0] == 1)  # the second window begins with 1
        return logits

    found = certify(IDS, theirs, lambda: spoiled)
    assert found.relative == pytest.approx(relative, rel=1e-3) and found.passed == passes
    assert certify(IDS[:1], theirs, lambda: spoiled).relative == 0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_verdict_does_not_depend_on_the_size_of_the_logits(scale):
    near = changed(random(scale=scale), lambda logits: logits * (1 + 1e-5))
    far = changed(random(scale=scale), lambda logits: logits * (1 + 1e-3))
    assert certify(IDS, random(scale=scale), near).passed and not certify(IDS, random(scale=scale), far).passed


def test_logits_are_compared_not_only_what_follows_from_them():
    """A constant on all logits changes no probability; a model that has it is another one all the same."""
    found = certify(IDS, random(), changed(random(), lambda logits: logits + 1))
    assert found.kl == pytest.approx(0, abs=1e-7) and not found.passed


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whose", ["theirs", "ours", "both"])
def test_what_is_not_finite_never_passes(bad, whose):
    def spoil(logits):
        logits = logits.clone()
        logits[0, 1, 3] = bad
        return logits

    spoiled = changed(random(), spoil)
    theirs, ours = (spoiled if whose in (name, "both") else random() for name in ("theirs", "ours"))
    found = certify(IDS, theirs, ours)
    assert found.relative == math.inf and not found.passed and "FAILED" in found.line()
    table = json.loads(json.dumps(found.table(), allow_nan=False))
    assert table["relative"] == "inf" and table["passed"] is False


def test_of_two_widths_nothing_can_be_said():
    with pytest.raises(Mistake, match="transformers' model has 7 logits, ours 8 → "):
        certify(IDS, random(), random(vocab=8))


def test_one_model_is_there_at_a_time_and_every_window_is_told():
    """The first is let go before the second is made: two of 70 billion parameters would not fit."""
    alive, told = [], []

    class Model:
        def __init__(self):
            assert not alive, "two models at once"
            alive.append(1)

        def __call__(self, ids):
            return random()()(ids)

        def __del__(self):
            alive.pop()

    assert certify(IDS, Model, Model, told.append).passed
    assert told == [1] * 4 and not alive


def test_the_line_and_the_table_say_the_same():
    found = Certificate(512, 2e-5, 20.0, 1e-12, 23.191, 23.1911)
    assert found.line() == (
        "passed · largest difference of a logit 2.0e-05 of 20 = 1.0e-06 (bound 1e-04) · KL 1.0e-12 · "
        "perplexity 23.191 theirs, 23.191 ours · 512 tokens"
    )
    with_texts = replace(found, texts=6, equal_texts=5)
    assert (
        not with_texts.passed and with_texts.line().startswith("FAILED") and with_texts.line().endswith("512 tokens · 5 of 6 texts equal")
    )
    assert with_texts.table().items() >= {"texts": 6, "equal_texts": 5}.items() and "texts" not in found.table()
    table = found.table()
    assert (table["relative"], table["bound"], table["passed"], table["tokens"]) == (pytest.approx(1e-6), BOUND, True, 512)
    assert table["text"].startswith("builtin:")


@pytest.mark.parametrize(("length", "shape"), [(8192, (2, 256)), (256, (2, 256)), (100, (5, 100)), (1, (512, 1))])
def test_the_text_is_the_same_for_every_model_in_windows_that_it_can_read(length, shape):
    words = tokenizer.gpt2()
    ids = sample_ids(words, length)
    assert tuple(ids.shape) == shape and ids.numel() <= TOKENS and shape[1] <= WINDOW
    assert torch.equal(ids.flatten(), sample_ids(words, 512).flatten()[: ids.numel()])
    assert words.decode(ids.flatten()).isprintable() or "\n" in words.decode(ids.flatten())
