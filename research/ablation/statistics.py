"""Whether a difference between two sets of runs is more than noise: paired Student t over seeds, Holm's correction, seeds needed.

A difference is that of two runs with the same seed: the same data order, and the same weights wherever shapes allow. The differences are
treated as independent and normal. There is no bootstrap: with three seeds its 95 % interval covers the truth in 78 % of cases.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

CONFIDENCE, POWER = 0.95, 0.8
"""Of an interval, and of the number of seeds that is proposed: how likely that many seeds tell the effect if it is there."""
MOST_SEEDS = 10_000
"""No larger number of seeds is proposed."""
TERMS = 10_000
"""After which a continued fraction is given up."""


def incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """The regularised incomplete beta function I_x(a, b), for `rest` = 1 − x, which the caller knows more exactly than by subtraction.

    By Lentz's method for its continued fraction (Abramowitz and Stegun 26.5.8).
    """
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, rest, x)
    if x == 0:
        return 0.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)) / a
    fraction, c, d = 1.0, 1.0, 0.0
    for term in range(TERMS):
        m = term // 2
        if term == 0:
            numerator = 1.0
        elif term % 2 == 0:
            numerator = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            numerator = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + numerator * d) if 1 + numerator * d else 1e300
        c = 1 + numerator / c or 1e-300
        fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * (fraction - 1)


def student_tails(t: float, freedom: float) -> float:
    """P(|T| ≥ |t|) of Student's t distribution with so many degrees of freedom: the two-sided p-value."""
    if math.isinf(t):
        return 0.0
    total = freedom + t * t
    return incomplete_beta(freedom / 2, 0.5, freedom / total, t * t / total)


@functools.cache
def student_quantile(tails: float, freedom: float) -> float:
    """The t ≥ 0 with P(|T| ≥ t) = `tails`: 4.303 for 0.05 and two degrees of freedom."""
    low, high = 0.0, 1.0
    while student_tails(high, freedom) > tails:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if student_tails(middle, freedom) > tails else (low, middle)
    return high


@dataclass(frozen=True)
class Effect:
    """The mean of paired differences over seeds, and what their spread says of it."""

    n: int
    """Pairs of runs."""
    mean: float
    deviation: float
    """The sample standard deviation of the differences; nan for one pair."""
    low: float
    high: float
    """The interval of CONFIDENCE for the mean; unbounded for one pair, which says nothing of the noise."""
    p: float
    """Two-sided p-value of no effect; 1 for one pair."""


def paired(differences: Sequence[float]) -> Effect:
    """The effect that finite differences, one for each seed, show."""
    n = len(differences)
    mean = math.fsum(differences) / n
    if n == 1:
        return Effect(1, mean, math.nan, -math.inf, math.inf, 1.0)
    deviation = math.sqrt(math.fsum((difference - mean) ** 2 for difference in differences) / (n - 1))
    stderr = deviation / math.sqrt(n)
    half = student_quantile(1 - CONFIDENCE, n - 1) * stderr
    t = mean / stderr if stderr else math.copysign(math.inf, mean) if mean else 0.0
    return Effect(n, mean, deviation, mean - half, mean + half, student_tails(t, n - 1))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: rejecting those ≤ α rejects any true hypothesis of the family with a probability of at most α."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def power(effect: float, deviation: float, n: int, tests: int = 1) -> float:
    """How likely a paired t-test with n seeds tells an effect, if the differences have this standard deviation.

    With several `tests`, it is the strictest level of Holm's correction, (1 − CONFIDENCE) / tests, which tells an effect whatever the
    other tests say: the power of the correction is at least this.
    P(|T| ≥ t) of the noncentral t distribution: its density given the sample's deviation w · deviation is normal; Gauss-Legendre over w.
    """
    if not deviation:
        return 1.0 if effect else 0.0
    freedom, shift = n - 1, abs(effect) / deviation * math.sqrt(n)
    threshold = student_quantile((1 - CONFIDENCE) / tests, freedom)
    nodes, weights = _gauss_legendre(200)
    w = (nodes + 1) / 2 * (1 + 9 / math.sqrt(freedom))  # beyond it the density is below 1e-20
    log_density = math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
    density = np.exp(log_density + (freedom - 1) * np.log(w) - freedom * w**2 / 2)
    tails = np.array([_normal_cdf(shift - threshold * x) + _normal_cdf(-shift - threshold * x) for x in w.tolist()])
    return min(1.0, float(np.sum(weights * density * tails) * (1 + 9 / math.sqrt(freedom)) / 2))


@functools.cache
def _gauss_legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(n)


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def seeds_needed(effect: float, deviation: float, tests: int = 1) -> int | None:
    """The smallest number of seeds that tells the effect with a probability of POWER; None if that is more than MOST_SEEDS."""
    if power(effect, deviation, MOST_SEEDS, tests) < POWER:
        return None
    low, high = 1, MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, deviation, middle, tests) >= POWER else (middle, high)
    return high


def smallest_effect(deviation: float, n: int) -> float:
    """The effect that n ≥ 2 seeds tell with a probability of POWER."""
    low, high = 0.0, 1.0
    while power(high, 1.0, n) < POWER:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, 1.0, n) >= POWER else (middle, high)
    return high * deviation


class Verdict(Enum):
    """What may be said of a variant beside the baseline."""

    BETTER = "better"
    WORSE = "worse"
    NOT_DISTINGUISHABLE = "not distinguishable"


def verdict(effect: Effect, adjusted_p: float, higher_is_better: bool) -> Verdict:
    """Better or worse if the adjusted p-value is at most 1 − CONFIDENCE. Under no effect that happens in 5 % of families of variants."""
    if effect.n < 2 or adjusted_p > 1 - CONFIDENCE or not effect.mean:
        return Verdict.NOT_DISTINGUISHABLE
    return Verdict.BETTER if (effect.mean > 0) == higher_is_better else Verdict.WORSE
