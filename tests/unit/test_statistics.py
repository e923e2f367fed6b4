"""The numerics of a measurement against hand-computed values, scipy, and simulated launches."""

import math

import numpy as np
import pytest

from edgewright.measure.statistics import (
    binomial_cdf,
    calls_for_claim,
    launch_ratio,
    mean_bounds,
    percentile_claims,
    quantile_bounds,
    slice_log_ratio,
    student_t,
    variation,
)


def test_binomial_cdf_by_hand():
    assert binomial_cdf(3, 0.5) == pytest.approx([1 / 8, 4 / 8, 7 / 8, 1])
    assert binomial_cdf(2, 0.9) == pytest.approx([0.01, 0.19, 1])


@pytest.mark.parametrize(("n", "p"), [(1, 0.5), (7, 0.1), (75, 0.5), (662, 0.99), (30_000, 0.9)])
def test_binomial_cdf_against_scipy(n, p):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binom.cdf(np.arange(n + 1), n, p)
    assert binomial_cdf(n, p) == pytest.approx(expected, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "low", "high"),
    [
        # The sign test's table: P(B <= 0) = 1/64 = 0.0156 at n = 6, so the extremes will do;
        # P(B <= 1) = 11/1024 = 0.0107 at n = 10, P(B <= 2) = 0.0547 is too much.
        (6, 1, 6),
        (10, 2, 9),
        (20, 6, 15),
        (25, 8, 18),
    ],
)
def test_median_bounds_are_the_order_statistics_of_the_sign_test(n, low, high):
    values = np.random.default_rng(0).permutation(np.arange(1, n + 1))
    assert quantile_bounds(values) == (low, high)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_too_few_values_have_no_bounds(n):
    assert quantile_bounds(np.arange(n)) == (None, None)


def test_bounds_of_a_high_quantile_may_lack_the_upper_side():
    low, high = quantile_bounds(np.arange(30), 0.9, 0.98)
    assert low is not None
    assert high is None  # 0.9 ** 30 = 0.042: all may well lie below the quantile


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_bounds_cover_a_skewed_distribution(quantile):
    rng = np.random.default_rng(1)
    truth = -math.log(1 - quantile)  # quantile of the exponential distribution
    bounds = [quantile_bounds(rng.exponential(size=80), quantile) for _ in range(2000)]
    covered = np.mean([low <= truth <= high for low, high in bounds])
    assert 0.94 < covered < 0.99


def test_calls_for_claims_are_those_of_mlperf():
    claims = {q: calls_for_claim(q) for q in (0.5, 0.9, 0.95, 0.99, 0.999)}
    assert claims == {0.5: 11, 0.9: 64, 0.95: 130, 0.99: 662, 0.999: 6636}


def test_percentiles_are_claimed_only_with_enough_calls():
    few = percentile_claims([0.001] * 63)
    assert few["p50_ms"] == pytest.approx(1.0)
    assert few["p90_ms"] is None
    assert few["p90_reason"] == "needs 64 calls, has 63"
    assert few["p90_low_ms"] is None
    assert few["p90_high_ms"] is None
    some = percentile_claims(np.linspace(0.001, 0.002, 661))
    assert some["p90_ms"] == pytest.approx(1.9)
    assert some["p90_low_ms"] < 1.9 < some["p90_high_ms"]
    assert some["p99_ms"] is None
    many = percentile_claims(np.linspace(0.001, 0.002, 662))
    assert many["p99_ms"] == pytest.approx(1.99)
    assert many["runs"] == 662


def test_slice_ratio_takes_the_statistic_of_each_side():
    candidate, original = [2.0, 2.0, 90.0], [4.0, 4.0, 4.0]
    same = [0, 0, 0]
    assert slice_log_ratio(candidate, original, same, np.median) == pytest.approx(math.log(0.5))
    assert slice_log_ratio(candidate, original, same, np.min) == pytest.approx(math.log(0.5))


def test_slice_ratio_pairs_inputs_of_one_size():
    # Half the calls are ten times as long; their share of the slice must not matter.
    sizes = [1, 1, 10, 10, 10]
    original = [1.0, 1.0, 10.0, 10.0, 10.0]
    candidate = [0.8 * t for t in original]
    assert slice_log_ratio(candidate, original, sizes, np.median) == pytest.approx(math.log(0.8))
    candidate = [0.8, 0.8, 7.0, 7.0, 7.0]
    expected = (math.log(0.8) + math.log(0.7)) / 2
    assert slice_log_ratio(candidate, original, sizes, np.median) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_slice_ratio_refuses_impossible_times(bad):
    with pytest.raises(ValueError, match="above zero"):
        slice_log_ratio([1.0, bad], [1.0, 1.0], [0, 0], np.median)
    with pytest.raises(ValueError, match="above zero"):
        slice_log_ratio([1.0, 1.0], [bad, 1.0], [0, 0], np.median)


def test_slice_ratio_refuses_slices_that_do_not_pair():
    with pytest.raises(ValueError, match="do not pair"):
        slice_log_ratio([1.0], [1.0, 1.0], [0, 0], np.median)


@pytest.mark.parametrize(
    ("degrees", "confidence", "t"), [(1, 0.95, 12.706), (2, 0.95, 4.303), (5, 0.975, 3.163)]
)
def test_student_t_by_table(degrees, confidence, t):
    assert student_t(degrees, confidence) == pytest.approx(t, abs=1e-3)


def test_student_t_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 3, 4, 5, 8, 11, 30):
        for confidence in (0.5, 0.9, 0.95, 0.975, 0.99):
            expected = stats.t.ppf((1 + confidence) / 2, degrees)
            assert student_t(degrees, confidence) == pytest.approx(expected, rel=1e-9)


def test_mean_bounds_by_hand():
    # mean 2, standard deviation 1, n = 3: 2 -+ 4.303 / sqrt(3)
    assert mean_bounds([1, 2, 3]) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)
    assert mean_bounds([1.0]) == (None, None)


def test_one_launch_has_the_bounds_of_the_sign_test():
    logs = np.log(np.arange(1, 11))
    found = launch_ratio([logs])
    assert found["ratio"] == pytest.approx(math.sqrt(5 * 6))
    assert (found["low"], found["high"]) == pytest.approx((2, 9))


def test_launches_that_disagree_widen_the_bounds():
    agree = launch_ratio([np.linspace(-0.01, 0.01, 25)] * 3)
    apart = launch_ratio([np.linspace(-0.01, 0.01, 25) + d for d in (-0.03, 0.0, 0.03)])
    assert agree["high"] < 1.01
    assert apart["high"] == pytest.approx(math.exp(4.303 * 0.03 / math.sqrt(3)), rel=1e-3)
    assert apart["low"] < 1 < apart["high"]


def test_no_pairs_have_no_ratio():
    assert launch_ratio([]) == {"ratio": None, "low": None, "high": None}
    few = launch_ratio([[0.0, 0.1], [0.0]])
    assert few["ratio"] == pytest.approx(1.0)
    assert few["low"] is None
    assert few["high"] is None


def simulated(rng: np.random.Generator, ratio: float) -> list[np.ndarray]:
    """Three launches as seen on the measuring machine: 0.6 % between, 3 % and tails within."""
    return [math.log(ratio) + rng.normal(0, 0.006) + 0.03 * rng.standard_t(3, 12) for _ in range(3)]


def test_bounds_hold_where_launches_differ():
    rng = np.random.default_rng(2)
    found = [launch_ratio(simulated(rng, 1.0)) for _ in range(500)]
    assert np.mean([f["low"] <= 1 <= f["high"] for f in found]) >= 0.95


def test_a_real_slowdown_is_seen():
    rng = np.random.default_rng(3)
    found = [launch_ratio(simulated(rng, 1.15)) for _ in range(200)]
    assert np.mean([f["low"] > 1.02 for f in found]) > 0.9


def test_variation_is_relative_to_each_group():
    assert variation([[1, 1, 1], [5, 5, 5]]) == pytest.approx(0)
    assert variation([[0.9, 1.0, 1.1]]) == pytest.approx(0.1)
    assert variation([[1.0]]) is None
    assert variation([]) is None
