"""Windows of running text: against transformers' published recipe, lm-evaluation-harness, and by counting."""

import pytest

from parallel.errors import Mistake
from research.evaluation import windows
from research.evaluation.task import Settings
from tests.research.example import sentence

SIZES = [(2, 9, 8), (9, 9, 8), (10, 9, 8), (40, 9, 8), (41, 9, 8), (41, 9, 3), (100, 16, 15), (57, 16, 1), (5, 16, 4), (33, 16, 8)]


def recipe(ids: list[int], max_length: int, stride: int) -> list[tuple[list[int], int]]:
    """(window, tokens that count in its loss) of the loop in transformers' "Perplexity of fixed-length models".

    There the labels of all but the last `trg_len` tokens are −100, and the model shifts them, so a window's first token never counts.
    """
    found, prev_end_loc, seq_len = [], 0, len(ids)
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        labels = [-100] * (end_loc - begin_loc - trg_len) + ids[end_loc - trg_len : end_loc]
        found.append((ids[begin_loc:end_loc], sum(label != -100 for label in labels[1:])))
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return found


@pytest.mark.parametrize(("tokens", "window", "stride"), SIZES)
def test_sliding_windows_are_those_of_the_recipe(tokens, window, stride):
    ids = list(range(tokens))
    ours = [(list(one.ids), one.scored) for one in windows.sliding(ids, window, stride)]
    assert ours == recipe(ids, window, stride)


@pytest.mark.parametrize("cut", [windows.sliding, windows.rolling])
@pytest.mark.parametrize(("tokens", "window", "stride"), SIZES)
def test_every_token_but_the_first_is_scored_once(cut, tokens, window, stride):
    ids = list(range(tokens))
    found = list(cut(ids, window, stride))
    assert [token for one in found for token in one.ids[-one.scored :]] == ids[1:]
    assert all(one.ids == tuple(range(one.ids[0], one.ids[-1] + 1)) and len(one.ids) <= window for one in found)
    assert all(one.scored == stride for one in found[1:-1])


@pytest.mark.parametrize(("tokens", "window"), [(2, 9), (9, 9), (10, 9), (40, 9), (100, 16), (31, 16)])
def test_rolling_windows_are_those_of_the_harness(tokens, window):
    utils = pytest.importorskip("lm_eval.utils")
    first, *ids = range(tokens)
    told = map(utils.make_disjoint_window, utils.get_rolling_token_windows(ids, first, window - 1, context_len=1))
    expected = [(tuple(context + predicted), len(predicted)) for context, predicted in told]
    assert [(one.ids, one.scored) for one in windows.rolling([first, *ids], window, window - 1)] == expected


def test_nothing_to_predict_is_no_window():
    assert list(windows.sliding([1], 9, 8)) == list(windows.rolling([1], 9, 8)) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(window=34), "--window 34 does not work, the model takes 2 to 33 tokens, the last of which is predicted → use that"),
        (Settings(window=1), "--window 1 does not work"),
        (Settings(window=16, stride=16), "--stride 16 does not work with a window of 16 tokens → use 1 to 15"),
        (Settings(stride=0), "--stride 0 does not work with a window of 33 tokens → use 1 to 32"),
    ],
)
def test_sizes_that_do_not_go_together(settings, said):
    assert said in sentence(lambda: windows.sizes(settings, 33))


def test_what_is_usual():
    assert windows.sizes(Settings(), 33) == (33, 32) and windows.sizes(Settings(window=16), 33) == (16, 15)
    with pytest.raises(Mistake):
        windows.sizes(Settings(window=33, stride=33), 33)
