"""Student's t beside scipy and a closed form, and what intervals and verdicts do over 10,000 synthetic ablations."""

import math

import numpy as np
import pytest

from research.ablation.statistics import (
    CONFIDENCE,
    MOST_SEEDS,
    POWER,
    Verdict,
    holm,
    paired,
    power,
    seeds_needed,
    smallest_effect,
    student_quantile,
    student_tails,
    verdict,
)

stats = pytest.importorskip("scipy.stats", reason="scipy is in requirements-dev.txt")

FREEDOM = (1, 2, 3, 4, 5, 9, 20, 50, 99, 200)
ABLATIONS = 10_000
DEVIATION_OF_A_RATE = math.sqrt(0.05 * 0.95 / ABLATIONS)
"""Standard deviation of a rate of 5 % that is counted in so many ablations: 0.22 %."""


def test_tails_and_quantiles_are_scipys() -> None:
    for freedom in FREEDOM:
        for t in (0.0, 0.1, 0.5, 1.0, 2.0, 4.3, 10.0, 50.0, 1000.0):
            assert student_tails(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-12)
        for tails in (0.5, 0.1, 0.05, 0.01, 1e-3, 1e-6):
            assert student_quantile(tails, freedom) == pytest.approx(stats.t.isf(tails / 2, freedom), rel=1e-12)


def test_tails_of_one_degree_of_freedom_are_the_arctangents() -> None:
    """scipy 1.17 is off by 3e-9 at t = 1e-8 here, so the closed form is the reference."""
    for t in (1e-8, 1e-3, 0.1, 1.0, 100.0):
        assert student_tails(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-14)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_paired_differences_are_scipys_paired_t_test(n: int) -> None:
    random = np.random.default_rng(n)
    for _ in range(20):
        a, b = random.normal(2.0, 0.1, n), random.normal(2.02, 0.1, n)
        effect, expected = paired((b - a).tolist()), stats.ttest_rel(b, a)
        interval = expected.confidence_interval(CONFIDENCE)
        assert effect.p == pytest.approx(expected.pvalue, rel=1e-12)
        assert (effect.low, effect.high) == pytest.approx((interval.low, interval.high), rel=1e-12)


def test_one_pair_and_equal_differences() -> None:
    one = paired([0.3])
    assert (one.low, one.high, one.p) == (-math.inf, math.inf, 1.0) and math.isnan(one.deviation)
    assert paired([0.0, 0.0, 0.0]).p == 1.0
    assert paired([0.5, 0.5]).p == 0.0 and paired([0.5, 0.5]).low == 0.5
    for higher_is_better in (False, True):
        assert verdict(one, one.p, higher_is_better) is verdict(paired([0.0] * 3), 0.0, higher_is_better) is Verdict.NOT_DISTINGUISHABLE
    assert verdict(paired([0.5, 0.5]), 0.0, True) is Verdict.BETTER and verdict(paired([0.5, 0.5]), 0.0, False) is Verdict.WORSE


@pytest.mark.parametrize("n", [3, 5, 10])
def test_intervals_cover_and_nothing_is_not_told(n: int) -> None:
    """Coverage 95 ± 1 %. Without an effect better and worse are 2.5 % each, and both 5 %, as far as 10,000 ablations can show it."""
    random = np.random.default_rng(100 + n)
    true = 0.02
    seeds = random.normal(0.0, 0.3, (ABLATIONS, n))  # what both runs of a pair share
    a = 2.0 + seeds + random.normal(0.0, 0.03, (ABLATIONS, n))
    b = 2.0 + true + seeds + random.normal(0.0, 0.05, (ABLATIONS, n))
    effects = [paired(row) for row in (b - a).tolist()]
    covered = sum(effect.low <= true <= effect.high for effect in effects) / ABLATIONS
    assert abs(covered - 0.95) <= 0.01

    nothing = [paired(row) for row in (b - a - true).tolist()]
    said = [verdict(effect, effect.p, higher_is_better=False) for effect in nothing]
    better, worse = (said.count(word) / ABLATIONS for word in (Verdict.BETTER, Verdict.WORSE))
    assert better + worse <= 0.05 + 3 * DEVIATION_OF_A_RATE and max(better, worse) <= 0.025 + 3 * DEVIATION_OF_A_RATE


@pytest.mark.parametrize("noise", ["normal", "student 3"])
def test_equal_configs_with_other_seeds_are_not_called_different(noise: str) -> None:
    """Two groups of five runs of one config with nothing in common: at least 95 %, within three standard deviations of that rate."""
    groups = 3000
    random = np.random.default_rng(7)
    draw = {
        "normal": lambda: random.normal(size=(groups, 5)),
        "student 3": lambda: random.standard_t(3, (groups, 5)),
    }[noise]
    a, b = 2.0 + 0.01 * draw(), 2.0 + 0.01 * draw()
    effects = [paired(row) for row in (b - a).tolist()]
    equal = sum(verdict(effect, effect.p, False) is Verdict.NOT_DISTINGUISHABLE for effect in effects) / groups
    assert equal >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / groups)


def test_holm_is_a_family_of_four_variants() -> None:
    """By hand: 0.01·4, max(0.04, 0.02·3), max(0.06, 0.03·2), max(0.06, 0.5). Any false verdict in at most 5 % of families."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
    random = np.random.default_rng(3)
    families = 1500
    baseline = random.normal(size=(families, 1, 5))
    differences = random.normal(size=(families, 4, 5)) - baseline
    wrong = sum(min(holm([paired(row).p for row in family])) <= 0.05 for family in differences.tolist()) / families
    assert wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / families)


def test_power_is_that_of_scipys_noncentral_t() -> None:
    for n in (2, 3, 5, 10, 30, 100, 1000):
        for effect in (0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0):
            threshold, shift = stats.t.isf(0.025, n - 1), effect * math.sqrt(n)
            if shift > 8:
                continue  # there scipy 1.17 says nan
            expected = stats.nct.sf(threshold, n - 1, shift) + stats.nct.cdf(-threshold, n - 1, shift)
            assert power(effect * 0.03, 0.03, n) == pytest.approx(expected, abs=1e-9)
    threshold = stats.t.isf(0.025 / 4, 4)  # one of four variants
    expected = stats.nct.sf(threshold, 4, math.sqrt(5)) + stats.nct.cdf(-threshold, 4, math.sqrt(5))
    assert power(0.03, 0.03, 5, tests=4) == pytest.approx(expected, abs=1e-9)


def test_seeds_proposed_for_one_of_four_variants_tell_it() -> None:
    """In at least 80 % of 2,000 synthetic comparisons with three variants that do nothing, by Holm; the seeds for one variant do not."""
    random, families = np.random.default_rng(14), 2000
    told = {}
    for tests in (1, 4):
        n = seeds_needed(1.0, 1.0, tests)
        assert n is not None
        differences = random.normal(size=(families, 4, n)) + np.array([1.0, 0, 0, 0])[:, None]
        told[tests] = sum(holm([paired(row).p for row in family])[0] <= 0.05 for family in differences.tolist()) / families
    assert told[4] >= POWER - 3 * math.sqrt(0.16 / families) and told[1] < 0.7, told


def test_seeds_needed_are_the_fewest_with_that_power() -> None:
    for effect, deviation in ((0.5, 1.0), (0.01, 0.03), (-0.02, 0.01), (3.0, 1.0)):
        n = seeds_needed(effect, deviation)
        assert n is not None and power(effect, deviation, n) >= POWER and (n == 2 or power(effect, deviation, n - 1) < POWER)
    assert seeds_needed(0.5, 1.0) == 34  # a textbook's number (G*Power: two-tailed, d_z = 0.5, power 0.8)
    assert seeds_needed(0.0, 1.0) is None and seeds_needed(1e-4, 1.0) is None and power(0.03, 1.0, MOST_SEEDS) > POWER
    for n in (2, 3, 5):
        assert power(smallest_effect(0.03, n), 0.03, n) == pytest.approx(POWER, abs=1e-6)
