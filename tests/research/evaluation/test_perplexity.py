"""Perplexity and bits per byte of running text.

Metrics are compared with closed forms over made-up log-probabilities, windows with transformers' published recipe, with
lm-evaluation-harness and by counting.
"""

import math

import pytest

from parallel.errors import Mistake
from research.evaluation import perplexity, registry, statistics
from research.evaluation.task import Metric, Settings, TaskContext, evaluate
from tests.research.evaluation.helpers.fake import Bigram, Distance, logprob
from tests.research.helpers import untrained
from tests.research.helpers.example import sentence

SETTINGS = [Settings(), Settings(window=16), Settings(window=16, stride=5), Settings(stride=1)]


def metrics_of(name: str, context: TaskContext, settings: Settings) -> dict[str, Metric]:
    (task,) = registry.create_tasks([name], settings)
    return {metric.name: metric for metric in evaluate(task.requests(context), Bigram())}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_validation_split(context, settings):
    """Every token but the first counts once; bits per byte are of the text's UTF-8 bytes, end-of-text not among them."""
    ids = [*context.tokenizer.encode(untrained.TEXT), context.tokenizer.end_of_text]
    nats = -math.fsum(map(logprob, ids, ids[1:]))
    metrics = metrics_of("validation", context, settings)
    assert metrics["loss"].value == pytest.approx(nats / (len(ids) - 1), rel=1e-12)
    assert metrics["perplexity"].value == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-12)
    assert metrics["bits_per_byte"].value == pytest.approx(nats / math.log(2) / len(untrained.TEXT.encode()), rel=1e-12)


def test_a_file_is_read_as_the_run_would(tmp_path, context):
    (tmp_path / "t.txt").write_text(untrained.TEXT, encoding="utf-8")
    assert metrics_of(f"perplexity:{tmp_path / 't.txt'}", context, Settings()) == metrics_of("validation", context, Settings())
    rows = '{"text": "the people"}\n{"text": "war — ½"}\n'
    (tmp_path / "t.jsonl").write_text(rows, encoding="utf-8")
    end = context.tokenizer.end_of_text
    ids = [*context.tokenizer.encode("the people"), end, *context.tokenizer.encode("war — ½"), end]
    metrics = metrics_of(f"perplexity:{tmp_path / 't.jsonl'}", context, Settings())
    assert metrics["loss"].value == pytest.approx(-math.fsum(map(logprob, ids, ids[1:])) / (len(ids) - 1), rel=1e-12)


def test_a_greater_overlap_gives_more_context(context):
    """The mean number of tokens before a scored one, counted by hand for two strides."""
    (task,) = registry.create_tasks(["validation"], Settings(window=9, stride=8, limit=3))
    assert evaluate(task.requests(context), Distance())[0].value == pytest.approx(sum(range(1, 9)) / 8)
    (task,) = registry.create_tasks(["validation"], Settings(window=9, stride=2, limit=5))
    assert evaluate(task.requests(context), Distance())[0].value == pytest.approx((sum(range(1, 9)) + 4 * (7 + 8)) / 16)


def test_a_part_of_a_text_has_no_count_of_bytes(context):
    metrics = metrics_of("validation", context, Settings(limit=2))
    assert list(metrics) == ["loss", "perplexity"]
    ids = context.tokenizer.encode(untrained.TEXT)[:65]
    assert metrics["loss"].value == pytest.approx(-math.fsum(map(logprob, ids, ids[1:])) / 64, rel=1e-12)


def test_standard_errors():
    """Of a mean: numpy's; of a ratio whose parts are equally large: the mean's, divided by the size; of one value: none."""
    numpy = pytest.importorskip("numpy")
    values = [1.0, 4.0, 2.5, -1.0, 7.25]
    expected = numpy.std(values, ddof=1) / numpy.sqrt(len(values))
    assert statistics.of_mean(values) == pytest.approx(expected, rel=1e-12)
    assert statistics.of_ratio(values, [4.0] * 5) == pytest.approx(expected / 4, rel=1e-12)
    assert statistics.of_mean([1.0]) is statistics.of_ratio([1.0], [2.0]) is None


def test_the_standard_error_of_a_ratio_is_the_spread_over_samples():
    """Drawn 2,000 times: 200 windows of 5 to 40 tokens whose nats are a noisy multiple of their number."""
    numpy = pytest.importorskip("numpy")
    g = numpy.random.default_rng(0)
    ratios, errors = [], []
    for _ in range(2000):
        counts = g.integers(5, 41, 200).astype(float)
        nats = counts * 3 + g.normal(0, 2, 200) * counts
        ratios.append(nats.sum() / counts.sum())
        errors.append(statistics.of_ratio(nats.tolist(), counts.tolist()))
    assert numpy.mean(errors) == pytest.approx(numpy.std(ratios), rel=0.06)


SIZES = [(2, 9, 8), (9, 9, 8), (10, 9, 8), (40, 9, 8), (41, 9, 8), (41, 9, 3), (100, 16, 15), (57, 16, 1), (5, 16, 4), (33, 16, 8)]


def recipe(ids: list[int], max_length: int, stride: int) -> list[tuple[list[int], int]]:
    """(window, tokens that count in its loss) of the loop in transformers' "Perplexity of fixed-length models".

    There the labels of all but the last `trg_len` tokens are −100, and the model shifts them, so a window's first token never counts.
    """
    windows, prev_end_loc, seq_len = [], 0, len(ids)
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        labels = [-100] * (end_loc - begin_loc - trg_len) + ids[end_loc - trg_len : end_loc]
        windows.append((ids[begin_loc:end_loc], sum(label != -100 for label in labels[1:])))
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return windows


@pytest.mark.parametrize(("tokens", "window", "stride"), SIZES)
def test_sliding_windows_are_those_of_the_recipe(tokens, window, stride):
    ids = list(range(tokens))
    ours = [(list(one.ids), one.scored) for one in perplexity.sliding_windows(ids, window, stride)]
    assert ours == recipe(ids, window, stride)


@pytest.mark.parametrize("split", [perplexity.sliding_windows, perplexity.rolling_windows])
@pytest.mark.parametrize(("tokens", "window", "stride"), SIZES)
def test_every_token_but_the_first_is_scored_once(split, tokens, window, stride):
    ids = list(range(tokens))
    windows = list(split(ids, window, stride))
    assert [token for one in windows for token in one.ids[-one.scored :]] == ids[1:]
    assert all(one.ids == tuple(range(one.ids[0], one.ids[-1] + 1)) and len(one.ids) <= window for one in windows)
    assert all(one.scored == stride for one in windows[1:-1])


@pytest.mark.parametrize(("tokens", "window"), [(2, 9), (9, 9), (10, 9), (40, 9), (100, 16), (31, 16)])
def test_rolling_windows_are_those_of_the_harness(tokens, window):
    utils = pytest.importorskip("lm_eval.utils")
    first, *ids = range(tokens)
    windows = map(utils.make_disjoint_window, utils.get_rolling_token_windows(ids, first, window - 1, context_len=1))
    expected = [(tuple(context + predicted), len(predicted)) for context, predicted in windows]
    assert [(one.ids, one.scored) for one in perplexity.rolling_windows([first, *ids], window, window - 1)] == expected


def test_nothing_to_predict_is_no_window():
    assert list(perplexity.sliding_windows([1], 9, 8)) == list(perplexity.rolling_windows([1], 9, 8)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(window=34), "--window 34 does not work, the model takes 2 to 33 tokens, the last of which is predicted → use that"),
        (Settings(window=1), "--window 1 does not work"),
        (Settings(window=16, stride=16), "--stride 16 does not work with a window of 16 tokens → use 1 to 15"),
        (Settings(stride=0), "--stride 0 does not work with a window of 33 tokens → use 1 to 32"),
    ],
)
def test_sizes_that_do_not_go_together(settings, message):
    assert message in sentence(lambda: perplexity.window_sizes(settings, 33))


def test_default_sizes():
    assert perplexity.window_sizes(Settings(), 33) == (33, 32) and perplexity.window_sizes(Settings(window=16), 33) == (16, 15)
    with pytest.raises(Mistake):
        perplexity.window_sizes(Settings(window=33, stride=33), 33)
