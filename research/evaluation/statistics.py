"""Standard errors of means and of ratios over examples, which are treated as independent."""

import math
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float:
    """Σ / n."""
    return math.fsum(values) / len(values)


def of_mean(values: Sequence[float]) -> float | None:
    """The standard error of a mean: sample deviation / √n, as lm-evaluation-harness' mean_stderr. None for one value."""
    n = len(values)
    if n < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (n - 1) / n)


def of_ratio(over: Sequence[float], under: Sequence[float]) -> float | None:
    """The standard error of r = Σ over / Σ under, by linearisation: √(n / (n − 1) · Σ (over − r · under)²) / Σ under.

    None for one value.
    """
    n, total = len(over), math.fsum(under)
    if n < 2:
        return None
    ratio = math.fsum(over) / total
    return math.sqrt(n / (n - 1) * math.fsum((a - ratio * b) ** 2 for a, b in zip(over, under, strict=True))) / total
