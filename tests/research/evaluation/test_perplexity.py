"""Perplexity and bits per byte of running text: closed forms over made-up log-probabilities, whatever the windows."""

import math

import pytest

from research.evaluation import errors, tasks
from research.evaluation.answers import answered
from research.evaluation.task import Given, Metric, Settings
from tests.research import untrained
from tests.research.evaluation.fake import Bigram, Distance, logprob

SETTINGS = [Settings(), Settings(window=16), Settings(window=16, stride=5), Settings(stride=1)]


def found(name: str, given: Given, settings: Settings, scorer=None) -> dict[str, Metric]:
    (task,) = tasks.named([name], settings)
    return {metric.name: metric for metric in answered(task.exam(given), scorer or Bigram())}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_validation_split(given, settings):
    """Every token but the first counts once; bits per byte are of the text's UTF-8 bytes, end-of-text not among them."""
    ids = [*given.tokenizer.encode(untrained.TEXT), given.tokenizer.end_of_text]
    nats = -math.fsum(map(logprob, ids, ids[1:]))
    metrics = found("validation", given, settings)
    assert metrics["loss"].value == pytest.approx(nats / (len(ids) - 1), rel=1e-12)
    assert metrics["perplexity"].value == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-12)
    assert metrics["bits_per_byte"].value == pytest.approx(nats / math.log(2) / len(untrained.TEXT.encode()), rel=1e-12)


def test_a_file_is_read_as_the_run_would(tmp_path, given):
    (tmp_path / "t.txt").write_text(untrained.TEXT, encoding="utf-8")
    assert found(f"perplexity:{tmp_path / 't.txt'}", given, Settings()) == found("validation", given, Settings())
    rows = '{"text": "the people"}\n{"text": "war — ½"}\n'
    (tmp_path / "t.jsonl").write_text(rows, encoding="utf-8")
    end = given.tokenizer.end_of_text
    ids = [*given.tokenizer.encode("the people"), end, *given.tokenizer.encode("war — ½"), end]
    metrics = found(f"perplexity:{tmp_path / 't.jsonl'}", given, Settings())
    assert metrics["loss"].value == pytest.approx(-math.fsum(map(logprob, ids, ids[1:])) / (len(ids) - 1), rel=1e-12)


def test_a_greater_overlap_gives_more_context(given):
    """The mean number of tokens before a scored one, counted by hand for two strides."""
    (task,) = tasks.named(["validation"], Settings(window=9, stride=8, limit=3))
    assert answered(task.exam(given), Distance())[0].value == pytest.approx(sum(range(1, 9)) / 8)
    (task,) = tasks.named(["validation"], Settings(window=9, stride=2, limit=5))
    assert answered(task.exam(given), Distance())[0].value == pytest.approx((sum(range(1, 9)) + 4 * (7 + 8)) / 16)


def test_a_part_of_a_text_has_no_count_of_bytes(given):
    metrics = found("validation", given, Settings(limit=2))
    assert list(metrics) == ["loss", "perplexity"]
    ids = given.tokenizer.encode(untrained.TEXT)[:65]
    assert metrics["loss"].value == pytest.approx(-math.fsum(map(logprob, ids, ids[1:])) / 64, rel=1e-12)


def test_standard_errors():
    """Of a mean: numpy's; of a ratio whose parts are equally large: the mean's, divided by the size; of one value: none."""
    numpy = pytest.importorskip("numpy")
    values = [1.0, 4.0, 2.5, -1.0, 7.25]
    expected = numpy.std(values, ddof=1) / numpy.sqrt(len(values))
    assert errors.of_mean(values) == pytest.approx(expected, rel=1e-12)
    assert errors.of_ratio(values, [4.0] * 5) == pytest.approx(expected / 4, rel=1e-12)
    assert errors.of_mean([1.0]) is errors.of_ratio([1.0], [2.0]) is None


def test_the_standard_error_of_a_ratio_is_the_spread_over_samples():
    """Drawn 2,000 times: 200 windows of 5 to 40 tokens whose nats are a noisy multiple of their number."""
    numpy = pytest.importorskip("numpy")
    g = numpy.random.default_rng(0)
    ratios, told = [], []
    for _ in range(2000):
        counts = g.integers(5, 41, 200).astype(float)
        nats = counts * 3 + g.normal(0, 2, 200) * counts
        ratios.append(nats.sum() / counts.sum())
        told.append(errors.of_ratio(nats.tolist(), counts.tolist()))
    assert numpy.mean(told) == pytest.approx(numpy.std(ratios), rel=0.06)
