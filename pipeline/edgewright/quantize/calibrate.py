"""Statistics of activations over calibration data: one streaming pass, bounded memory.

Per tensor the pass keeps the exact extrema and a histogram of fixed size. A histogram covers
[-2**e, 2**e) with BINS bins of equal width; when a value falls outside, e grows and
neighbouring bins are merged pair by pair, which is exact: the result does not depend on the
order or grouping of the samples, and two histograms can be added. (Of tensors with more than
SUBSAMPLE elements only some enter the histogram; which ones moves on from sample to sample.)
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx

from edgewright.data import Feed
from edgewright.errors import BadInput
from edgewright.runtime.local import open_local
from edgewright.taps import expose, fetch_groups

BINS = 4096  # 16 bins per int8 step when the whole range is used
SUBSAMPLE = 1 << 16  # elements of one tensor and sample that enter its histogram at most
TINY = -100  # smallest exponent: below 2**-100 everything is zero for int8


@dataclass
class Statistics:
    """What calibration knows of one tensor.

    low, high: extrema over all samples. exponent, counts: the histogram. samples: how many
    samples had values there. size: elements of the largest sample.
    """

    low: float = np.inf
    high: float = -np.inf
    exponent: int = TINY
    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    samples: int = 0
    size: int = 0

    def add(self, value: np.ndarray) -> None:
        """Take in one sample's values (float, all finite)."""
        if value.size == 0:
            return
        low, high = float(value.min()), float(value.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.samples += 1
        self.size = max(self.size, value.size)
        if not (math.isfinite(low) and math.isfinite(high)):
            self.low, self.high = -math.inf, math.inf  # told apart by `take`
            return
        # frexp's exponent is the least e with peak < 2**e: the end itself would belong to
        # different bins before and after a merge.
        peak = max(abs(low), abs(high))
        self.widen(max(math.frexp(peak)[1], TINY) if peak else TINY)
        flat = value.reshape(-1)
        stride = -(-flat.size // SUBSAMPLE)
        if stride > 1:
            stride += 1 - stride % 2  # odd: does not stay in step with even-sized rows
            flat = flat[self.samples % stride :: stride]
        # One multiplication by a power of two and one cut: no rounding decides a bin. A factor
        # below 1 could take a tiny value to zero in float32, and its sign with it.
        factor = 2.0**-self.exponent * (BINS // 2)
        kind = np.dtype(np.float32 if factor >= 1 else np.float64)
        position = flat.astype(kind) * np.asarray(factor, kind)
        index = np.floor(position).astype(np.int32) + BINS // 2
        self.counts += np.bincount(index, minlength=BINS)

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
        """Add the samples of another pass over the same tensor."""
        if other.samples == 0:
            return
        self.widen(other.exponent)
        grown = Statistics(exponent=other.exponent, counts=other.counts.copy())
        grown.widen(self.exponent)
        self.counts = self.counts + grown.counts
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.samples += other.samples
        self.size = max(self.size, other.size)

    def centers(self) -> np.ndarray:
        """Mid-points of the bins."""
        width = 2.0 ** (self.exponent + 1) / BINS
        return (np.arange(BINS) - BINS // 2 + 0.5) * width


def collect(
    model: onnx.ModelProto,
    tensors: list[str],
    feeds: Callable[[], Iterable[Feed]],
    tell: Callable[[str, int, int], None] = lambda text, done, total: None,
    threads: int = 1,
) -> dict[str, Statistics]:
    """Statistics of the named float tensors of the main graph over all feeds.

    Only FETCH_BYTES of activations are held at a time: where one sample needs more, the model
    runs several times on it. Raises BadInput with sample index and tensor name for NaN or Inf.
    """
    session = open_local(expose(model, tensors).SerializeToString(), threads=threads)
    inputs = {v.name for v in model.graph.input}
    statistics = {name: Statistics() for name in tensors}
    groups: list[list[str]] = []
    for k, feed in enumerate(feeds()):
        tell("calibrating", k, 0)
        if not groups:
            groups = fetch_groups(session, feed, [n for n in tensors if n not in inputs])
        for name in tensors:
            if name in inputs:
                take(statistics[name], feed[name], name, k)
        for group in groups:
            for name, value in zip(group, session.run(feed, group), strict=True):
                take(statistics[name], value, name, k)
    return statistics


def take(statistics: Statistics, value: np.ndarray, name: str, sample: int) -> None:
    """Add one value, refusing what would poison the ranges."""
    statistics.add(value)
    if not (np.isfinite(statistics.low) and np.isfinite(statistics.high)) and value.size:
        kind = "NaN" if np.isnan(value).any() else "Inf"
        raise BadInput(
            f"calibration sample {sample} makes tensor '{name}' of the model {kind}",
            expected="finite values everywhere",
            hint="remove that sample, or mend the model where the value arises",
        )
