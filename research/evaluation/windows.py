"""Running text in windows: every token but the first is predicted once, the `stride` last of each window from what precedes them."""

from collections.abc import Iterator, Sequence

from parallel.errors import Mistake
from research.evaluation.task import Settings
from research.scorer import Asked


def sizes(settings: Settings, length: int) -> tuple[int, int]:
    """(window, stride) for a scorer that takes `length` tokens. A Mistake where they do not go together."""
    window = length if settings.window is None else settings.window
    if not 2 <= window <= length:
        raise Mistake(f"--window {window} does not work, the model takes 2 to {length} tokens, the last of which is predicted → use that")
    stride = window - 1 if settings.stride is None else settings.stride
    if not 1 <= stride < window:
        raise Mistake(f"--stride {stride} does not work with a window of {window} tokens → use 1 to {window - 1}")
    return window, stride


def sliding(ids: Sequence[int], window: int, stride: int) -> Iterator[Asked]:
    """Windows that begin every `stride` tokens, as in transformers' documentation ("Perplexity of fixed-length models").

    The first scores all its tokens but one, the last may be shorter. stride = window − 1 is what training's validation does.
    """
    scored_to = 1
    for begin in range(0, max(len(ids) - 1, 0), stride):
        end = min(begin + window, len(ids))
        yield Asked(tuple(ids[begin:end]), end - scored_to)
        scored_to = end
        if end == len(ids):
            return


def rolling(ids: Sequence[int], window: int, stride: int) -> Iterator[Asked]:
    """As `sliding`, but the last window is as long as the others: lm-evaluation-harness' rolling log-likelihood at stride = window − 1."""
    scored_to = 1
    while scored_to < len(ids):
        end = min(window if scored_to == 1 else scored_to + stride, len(ids))
        yield Asked(tuple(ids[max(0, end - window) : end]), end - scored_to)
        scored_to = end
