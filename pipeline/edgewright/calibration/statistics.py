"""Statistics of one activation over calibration samples: fixed size, exact to merge.

A histogram covers [-2**e, 2**e) with BINS bins of equal width; when a value falls outside, e
grows and neighbouring bins are merged pair by pair. Growing is exact, and what a sample adds
depends on that sample and its index alone, so the result is the same for every order, grouping
and sharding of the samples. (Of tensors with more than SUBSAMPLE elements only some enter the
histogram; which ones moves on with the index of the sample.)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

BINS = 4096  # 16 bins per int8 step when the whole range is used
SUBSAMPLE = 1 << 16  # elements of one tensor and sample that enter its histogram at most
TINY = -100  # smallest exponent: below 2**-100 everything is zero for int8
RECENT = 256  # samples whose own extrema are kept: the last ones


@dataclass
class Statistics:
    """What calibration knows of one tensor.

    low, high: extrema over all samples. exponent, counts: the histogram, int64 (BINS,).
    samples: how many samples had values there. size: elements of the largest sample.
    recent, extrema: the last RECENT samples, (RECENT,) int64 and (RECENT, 2) float64: sample k
    at place k % RECENT, its index (-1: none yet) and its low and high.
    """

    low: float = math.inf
    high: float = -math.inf
    exponent: int = TINY
    samples: int = 0
    size: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    recent: np.ndarray = field(default_factory=lambda: np.full(RECENT, -1, np.int64))
    extrema: np.ndarray = field(default_factory=lambda: np.zeros((RECENT, 2)))

    def add(self, value: np.ndarray, index: int) -> None:
        """Take in the values of sample `index`, once; FloatingPointError for NaN and Inf."""
        if value.size == 0:
            return
        low, high = float(value.min()), float(value.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise FloatingPointError("NaN" if math.isnan(low) or math.isnan(high) else "Inf")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.samples += 1
        self.size = max(self.size, value.size)
        if index > self.recent[index % RECENT]:
            self.recent[index % RECENT] = index
            self.extrema[index % RECENT] = low, high
        # frexp's exponent is the least e with peak < 2**e: the end itself would belong to
        # different bins before and after a merge.
        peak = max(abs(low), abs(high))
        self.widen(max(math.frexp(peak)[1], TINY) if peak else TINY)
        flat = value.reshape(-1)
        stride = -(-flat.size // SUBSAMPLE)
        if stride > 1:
            stride += 1 - stride % 2  # odd: does not stay in step with even-sized rows
            flat = flat[index % stride :: stride]
        # One multiplication by a power of two and one cut: no rounding decides a bin. A factor
        # below 1 could take a tiny value to zero in float32, and its sign with it.
        factor = 2.0**-self.exponent * (BINS // 2)
        kind = np.dtype(np.float32 if factor >= 1 else np.float64)
        position = flat.astype(kind)
        position *= kind.type(factor)
        place = np.floor(position, out=position).astype(np.int32)
        place += BINS // 2
        self.counts += np.bincount(place, minlength=BINS)

    def widen(self, exponent: int) -> None:
        """Grow the covered range to 2**exponent, merging bins pair by pair."""
        if not self.counts.any():
            self.exponent = max(self.exponent, exponent)
            return
        while self.exponent < exponent:
            half = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.zeros(BINS, np.int64)
            self.counts[BINS // 4 : BINS // 4 + BINS // 2] = half
            self.exponent += 1

    def merge(self, other: "Statistics") -> None:
        """Add the statistics of other samples of the same tensor."""
        if other.samples == 0:
            return
        self.widen(other.exponent)
        grown = Statistics(exponent=other.exponent, counts=other.counts.copy())
        grown.widen(self.exponent)
        self.counts = self.counts + grown.counts
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.samples += other.samples
        self.size = max(self.size, other.size)
        later = other.recent > self.recent
        self.recent = np.where(later, other.recent, self.recent)
        self.extrema = np.where(later[:, None], other.extrema, self.extrema)

    def centers(self) -> np.ndarray:
        """Mid-points of the bins."""
        width = 2.0 ** (self.exponent + 1) / BINS
        return (np.arange(BINS) - BINS // 2 + 0.5) * width

    def last_extrema(self) -> np.ndarray:
        """Low and high of each of the last samples that had values, in order: (n, 2)."""
        # Only indices within RECENT of the newest: an older one may stand where no sample came.
        kept = self.recent > max(self.recent.max() - RECENT, -1)
        order = np.argsort(self.recent[kept])
        found: np.ndarray = self.extrema[kept][order]
        return found


def to_arrays(statistics: list[Statistics]) -> dict[str, np.ndarray]:
    """Several statistics as a few arrays, to cross a process border."""
    return {
        "numbers": np.array(
            [(s.low, s.high, s.exponent, s.samples, s.size) for s in statistics], np.float64
        ).reshape(-1, 5),
        **{
            key: np.stack([getattr(s, key) for s in statistics])
            for key in ("counts", "recent", "extrema")
            if statistics
        },
    }


def from_arrays(arrays: Mapping[str, np.ndarray]) -> list[Statistics]:
    """The statistics that `to_arrays` described."""
    found = []
    for k, (low, high, exponent, samples, size) in enumerate(arrays["numbers"]):
        rest = {key: arrays[key][k].copy() for key in ("counts", "recent", "extrema")}
        whole = int(exponent), int(samples), int(size)
        found.append(Statistics(float(low), float(high), *whole, **rest))
    return found
