"""The range whose int8 form tells least from the float distribution, by relative entropy.

Migacz, 8-bit Inference with TensorRT (GTC 2017, S7310), pages 34 to 38: clip at a threshold T,
fold the clipped mass into the outermost bins (P), merge the kept bins into levels and spread
each level evenly over those of its bins that are not empty (Q), take the T with the least
D(P || Q). What differs:
- A range need not be symmetric: T bounds both sides, and the extrema bound T.
- Levels whose width is no whole number of bins are cut where they fall.
- The bins of zero and of both ends are levels of their own: their values have a code of their
  own, and spread over a level the zeros of a ReLU would look like a loss.
- Q gets a share SMOOTHING of the even distribution: clipped mass in an empty bin stays finite.
"""

import numpy as np

from edgewright.calibration.statistics import BINS, Statistics

LEVELS = 256
CANDIDATES = 128
SMOOTHING = 1e-4
FINE = 2  # bins per level at least: with one, rounding costs nothing and the least T would win


def entropy(s: Statistics) -> tuple[float, float]:
    """The range (low, high) of least relative entropy; zero is inside."""
    low, high = min(s.low, 0.0), max(s.high, 0.0)
    filled = np.nonzero(s.counts)[0]
    if filled.size == 0 or low == high:
        return low, high
    zero, width = BINS // 2, 2.0 ** (s.exponent + 1) / BINS
    first, end = min(int(filled[0]), zero), max(int(filled[-1]) + 1, zero)
    windows = [(max(first, zero - t), min(end, zero + t)) for t in thresholds(first, end)]
    losses = [relative_entropy(s.counts, a, b) for a, b in windows]
    if not losses:
        return low, high
    a, b = windows[int(np.argmin(losses))]
    return max(low, (a - zero) * width), min(high, (b - zero) * width)


def thresholds(first: int, end: int) -> list[int]:
    """Candidates in bins from zero, widest first: of equal losses the widest range wins."""
    zero = BINS // 2
    widest = max(zero - first, end - zero)
    left, right = zero - first, end - zero
    # The least t with min(left, t) + min(right, t) >= FINE * LEVELS.
    wanted = FINE * LEVELS
    least = max(-(-wanted // 2), wanted - min(left, right))
    if least > widest:
        return []
    return np.unique(np.linspace(least, widest, CANDIDATES).astype(int))[::-1].tolist()


def relative_entropy(counts: np.ndarray, first: int, end: int) -> float:
    """D(P || Q) in nats of a histogram clipped to bins [first, end); counts: (BINS,)."""
    kept = counts[first:end].astype(float)
    size = kept.size
    exact = np.unique(np.clip([0, BINS // 2 - first, size - 1], 0, size - 1))
    spread = kept.copy()
    spread[exact] = 0
    filled = spread > 0
    edges = -(-np.arange(LEVELS + 1) * size // LEVELS)
    mass = np.add.reduceat(spread, edges[:-1])
    places = np.add.reduceat(filled.astype(float), edges[:-1])
    q = np.repeat(mass / np.maximum(places, 1), np.diff(edges)) * filled
    q[exact] = kept[exact]
    p = kept
    p[0] += counts[:first].sum()
    p[-1] += counts[end:].sum()
    here = p > 0
    p, q = p[here] / p.sum(), q[here] / max(q.sum(), 1)
    q = (1 - SMOOTHING) * q + SMOOTHING / p.size
    return float((p * np.log(p / q)).sum())
