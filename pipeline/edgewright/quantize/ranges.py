"""From statistics to an int8 range: pure numbers, no graph.

A range is (low, high), zero always inside, so that zero has an exact code (padding, ReLU).
"""

import numpy as np

from edgewright.calibration.statistics import Statistics
from edgewright.quantize.entropy import entropy

LEVELS = 255  # steps of an 8-bit range
MOMENTUM = 0.9  # of the moving average; RECENT samples later a weight is below 1e-11


def minmax(s: Statistics) -> tuple[float, float]:
    """The extrema, widened to hold zero."""
    return min(s.low, 0.0), max(s.high, 0.0)


def moving_average(s: Statistics) -> tuple[float, float]:
    """The exponential moving average of the samples' own extrema, in their order.

    It begins with the oldest sample kept; what came before would weigh less than rounding.
    """
    each = s.last_extrema()
    if not len(each):
        return minmax(s)
    weights = (1 - MOMENTUM) * MOMENTUM ** np.arange(len(each) - 1.0, -1.0, -1.0)
    weights[0] /= 1 - MOMENTUM
    low, high = (each * weights[:, None]).sum(axis=0).tolist()
    return max(min(low, 0.0), min(s.low, 0.0)), min(max(high, 0.0), max(s.high, 0.0))


def percentile(s: Statistics, share: float) -> tuple[float, float]:
    """The values between which `share` percent of all lie, half of the rest cut on each side."""
    cumulative = np.cumsum(s.counts) / max(int(s.counts.sum()), 1)
    cut = (1 - share / 100) / 2
    centers = s.centers()
    low = centers[min(int(np.searchsorted(cumulative, cut)), len(centers) - 1)]
    high = centers[min(int(np.searchsorted(cumulative, 1 - cut)), len(centers) - 1)]
    return max(min(float(low), 0.0), min(s.low, 0.0)), min(max(float(high), 0.0), max(s.high, 0.0))


def mse(
    s: Statistics, symmetric: bool = False, response: np.ndarray | None = None
) -> tuple[float, float]:
    """The range with the least mean squared error over the histogram.

    Both ends are searched in turn over 60 shares of the extrema (symmetric: one peak), on the
    bin centres, 16 of which fit into one step, so the estimate is good to 1 %. `response`:
    values of the function that is applied to the tensor next, at the bin centres; the error is
    then that of the function's value, so that what the function ignores costs nothing.
    """
    low, high = minmax(s)
    filled = np.nonzero(s.counts)[0]
    if filled.size == 0 or low == high:
        return low, high
    centers = s.centers()
    table = (centers, centers if response is None else response.astype(float))
    x, weight = np.clip(centers[filled], low, high), s.counts[filled].astype(float)
    shares = np.geomspace(1.0, 0.02, 60)
    if symmetric:
        peak = max(-low, high)
        lows, highs = -peak * shares, peak * shares
        best = int(np.argmin(errors(x, weight, lows, highs, table)))
        return max(lows[best], low), min(highs[best], high)
    for _ in range(2):
        if high > 0:
            highs = max(s.high, 0.0) * shares
            high = highs[int(np.argmin(errors(x, weight, np.full(60, low), highs, table)))]
        if low < 0:
            lows = min(s.low, 0.0) * shares
            low = lows[int(np.argmin(errors(x, weight, lows, np.full(60, high), table)))]
    return float(low), float(high)


def errors(
    x: np.ndarray,
    weight: np.ndarray,
    lows: np.ndarray,
    highs: np.ndarray,
    table: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Sum of weight * (f(x) - f(q(x)))**2 for each range; x, weight: (n,), lows, highs: (m,).

    f is given by its values at sorted points, linear in between.
    """
    step = np.maximum((highs - lows) / LEVELS, 1e-38)[:, None]
    zero = np.round(-lows[:, None] / step)
    code = np.clip(np.round(x[None] / step) + zero, 0, LEVELS)
    difference = np.interp((code - zero) * step, *table) - np.interp(x, *table)[None]
    return (difference**2 @ weight).astype(float)


def choose(
    s: Statistics, method: str, share: float, symmetric: bool, response: np.ndarray | None = None
) -> tuple[float, float]:
    """The range by the recipe's method."""
    if method == "mse":
        return mse(s, symmetric, response)
    if method == "percentile":
        return percentile(s, share)
    plain = {"minmax": minmax, "moving-average": moving_average, "entropy": entropy}
    return plain[method](s)
