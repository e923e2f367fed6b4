"""The numerics of a measurement: exact bounds of quantiles, paired ratios, quietness of a host.

Pure functions on arrays of seconds; nothing here runs a model. The bounds are distribution-free:
latencies have skewed tails, so nothing that assumes a shape (t-test, Wilcoxon) is used.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

Bounds = tuple[float | None, float | None]


def binomial_cdf(n: int, p: float) -> np.ndarray:
    """P(B <= k) for k = 0 .. n, where B counts the successes of n trials of chance 0 < p < 1."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])  # log k!
    k = np.arange(n + 1)
    log_pmf = logs[n] - logs - logs[::-1] + k * math.log(p) + (n - k) * math.log1p(-p)
    cdf: np.ndarray = np.minimum(np.cumsum(np.exp(log_pmf)), 1.0)
    return cdf


def quantile_bounds(
    values: Sequence[float] | np.ndarray, quantile: float = 0.5, confidence: float = 0.95
) -> Bounds:
    """Order statistics that enclose the `quantile` with at least `confidence`; None: no such one.

    With B ~ Binomial(n, q) counting the values below the quantile, the l-th smallest value is
    above it with P(B <= l - 1), the u-th smallest below it with P(B >= u). l is the largest and
    u the smallest number that keeps each of these at most (1 - confidence) / 2. For q = 0.5 this
    is the sign test turned round (Conover, Practical Nonparametric Statistics, 3rd ed., 3.2).
    """
    data = np.sort(np.asarray(values, dtype=float))
    n, tail = data.size, (1 - confidence) / 2
    if n == 0:
        return None, None
    below = binomial_cdf(n, quantile)
    above = binomial_cdf(n, 1 - quantile)  # above[n - u] = P(n - B <= n - u) = P(B >= u)
    low = int((below <= tail).sum())  # P(B <= l - 1) <= tail for l = 1 .. low
    high = n - int((above <= tail).sum()) + 1
    return (
        float(data[low - 1]) if low >= 1 else None,
        float(data[high - 1]) if high <= n else None,
    )


def calls_for_claim(quantile: float, confidence: float = 0.99) -> int:
    """Fewest calls that support a claim on a latency quantile.

    MLPerf Inference, early stopping with d = 0 and one call over the latency allowed: the
    smallest n with P(Binomial(n, 1 - q) <= 1) <= 1 - confidence. 64 for p90, 662 for p99.
    """
    n = 2
    while quantile**n + n * (1 - quantile) * quantile ** (n - 1) > 1 - confidence:
        n += 1
    return n


def slice_log_ratio(
    candidate: Sequence[float],
    original: Sequence[float],
    classes: Sequence[int],
    statistic: Callable[[np.ndarray], float],
) -> float:
    """ln(candidate / original) of one pair of slices; ValueError where a time is not above zero.

    candidate, original: (calls,) times; classes: (calls,) the kind of input of each call, the
    same on both sides. The statistic is taken per class and the ratios' median over the classes:
    with inputs of many sizes, a median over all calls would jump between sizes.
    """
    a, b, kinds = np.asarray(candidate, float), np.asarray(original, float), np.asarray(classes)
    if not a.size == b.size == kinds.size:
        raise ValueError(f"{a.size} and {b.size} calls of {kinds.size} inputs do not pair")
    if not (np.isfinite(a).all() and np.isfinite(b).all() and min(a.min(), b.min()) > 0):
        raise ValueError("times must be finite and above zero")
    ratios = [
        math.log(statistic(a[kinds == kind]) / statistic(b[kinds == kind]))
        for kind in np.unique(kinds)
    ]
    return float(np.median(ratios))


def student_t(degrees: int, confidence: float) -> float:
    """t with P(-t <= T <= t) = confidence, T ~ Student's t of a whole number of degrees >= 1.

    By bisection of the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """

    def inside(t: float) -> float:
        angle = math.atan(t / math.sqrt(degrees))
        cosine = math.cos(angle)
        odd = degrees % 2 == 1
        term = cosine if odd else 1.0
        total = term if degrees > 1 else 0.0
        for k in range(3 if odd else 2, degrees, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < confidence else (low, middle)
    return high


def mean_bounds(values: Sequence[float], confidence: float = 0.95) -> Bounds:
    """Student's bounds of the mean; None for fewer than two values, which tell no spread."""
    data = np.asarray(values, dtype=float)
    if data.size < 2:
        return None, None
    reach = student_t(data.size - 1, confidence) * data.std(ddof=1) / math.sqrt(data.size)
    return float(data.mean() - reach), float(data.mean() + reach)


def launch_ratio(
    launches: Sequence[Sequence[float]], confidence: float = 0.95
) -> dict[str, float | None]:
    """Median ratio candidate / original and its bounds, from the log-ratios of each launch.

    The bounds are the wider of two: the sign test over all pairs, exact but blind to what sets
    one launch apart from another, and Student's over the medians of the launches, which sees
    just that. Bounds are None below 6 pairs (at 95 %), where no order statistic reaches the
    confidence; with a single launch they are those of the sign test.
    """
    logs = [value for launch in launches for value in launch]
    if not logs:
        return {"ratio": None, "low": None, "high": None}
    middle = float(np.median(logs))
    low, high = quantile_bounds(logs, 0.5, confidence)
    if low is None or high is None:
        return {"ratio": math.exp(middle), "low": None, "high": None}
    between = mean_bounds([float(np.median(v)) for v in launches if len(v)], confidence)
    if between[0] is not None and between[1] is not None:
        low, high = min(low, between[0]), max(high, between[1])
    return {"ratio": math.exp(middle), "low": math.exp(low), "high": math.exp(high)}


def sign_ratio(logs: Sequence[float], low_tail: float, high_tail: float) -> dict[str, float | None]:
    """Median ratio and exact one-sided bounds of it, from log-ratios: see `quantile_bounds`.

    The ratio is below `low` with at most the chance low_tail, above `high` with high_tail.
    """
    if not len(logs):
        return {"ratio": None, "low": None, "high": None}
    low = quantile_bounds(logs, 0.5, 1 - 2 * low_tail)[0]
    high = quantile_bounds(logs, 0.5, 1 - 2 * high_tail)[1]
    return {
        "ratio": math.exp(float(np.median(logs))),
        "low": None if low is None else math.exp(low),
        "high": None if high is None else math.exp(high),
    }


def percentile_claims(wall_s: Sequence[float]) -> dict[str, float | int | str | None]:
    """p50, p90 and p99 of single calls in ms, and 98 % bounds of p90 (99 % on either side).

    A percentile which the number of calls does not support is None, with the reason beside it.
    """
    values = np.asarray(wall_s, dtype=float) * 1e3
    claims: dict[str, float | int | str | None] = {"runs": int(values.size)}
    for quantile, key in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99")):
        floor = 1 if quantile == 0.5 else calls_for_claim(quantile)
        if values.size >= floor:
            claims[f"{key}_ms"] = float(np.quantile(values, quantile))
        else:
            claims[f"{key}_ms"] = None
            claims[f"{key}_reason"] = f"needs {floor} calls, has {values.size}"
    low, high = quantile_bounds(values, 0.9, 0.98)
    enough = claims["p90_ms"] is not None
    claims["p90_low_ms"] = low if enough else None
    claims["p90_high_ms"] = high if enough else None
    return claims


def variation(groups: Sequence[Sequence[float]]) -> float | None:
    """Coefficient of variation of fixed work, each group relative to its own median."""
    relative = [np.asarray(g, dtype=float) / np.median(g) for g in groups if len(g)]
    values = np.concatenate(relative) if relative else np.empty(0)
    if values.size < 3:
        return None
    return float(values.std(ddof=1) / values.mean())
