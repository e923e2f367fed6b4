"""What two versions of an activation have to do with each other: streamed second moments.

x are the channel vectors of the original model, z those of the pruned one, at the same places of
the same samples. From their moments follows the affine map z -> x of least squares, which is all
that compensation needs. Even and odd samples are kept apart, so that a map fitted on one half
can be judged on the other.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

# Ridge per mean variance of a channel of z. Facts: 1e-3 fits convolutional nets with thousands
# of places; few samples want more, an exact linear relation wants less.
STRENGTHS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, np.inf)
START = 2
LARGEST = (
    10.0  # part of a map, in standard deviations, above which it fits noise (Kwon, 2204.09656)
)


@dataclass
class Half:
    """Sums over one half of the samples, around an origin near the mean.

    n: places. z, x: sums. zz: (new, new), xz: (old, new), xx: diagonal only (old).
    """

    n: int = 0
    z: np.ndarray | float = 0.0
    x: np.ndarray | float = 0.0
    zz: np.ndarray | float = 0.0
    xz: np.ndarray | float = 0.0
    xx: np.ndarray | float = 0.0

    def __add__(self, other: "Half") -> "Half":
        names = ("n", "z", "x", "zz", "xz", "xx")
        return Half(*(getattr(self, n) + getattr(other, n) for n in names))


@dataclass
class Moments:
    """Moments of x and z over all samples added; memory depends on the channels only."""

    samples: int = 0
    halves: tuple[Half, Half] = field(default_factory=lambda: (Half(), Half()))
    origin_x: np.ndarray = field(default_factory=lambda: np.zeros(0))
    origin_z: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def add(self, x: np.ndarray, z: np.ndarray) -> None:
        """Take in one sample: x (old channels, places), z (new channels, places), float32.

        Summed around the first sample's mean: around zero, in float32, a mean far from zero
        would swallow the variance.
        """
        with np.errstate(invalid="ignore", over="ignore"):  # `fit` refuses what is not finite
            self.sum_up(x, z)

    def sum_up(self, x: np.ndarray, z: np.ndarray) -> None:
        """Add the sums of one sample."""
        if self.samples == 0:
            self.origin_x = x.mean(axis=1, dtype=np.float64)
            self.origin_z = z.mean(axis=1, dtype=np.float64)
        half = self.halves[self.samples % 2]
        self.samples += 1
        x = x - self.origin_x[:, None].astype(np.float32)
        z = z - self.origin_z[:, None].astype(np.float32)
        half.n += x.shape[1]
        half.x = half.x + x.sum(axis=1, dtype=np.float64)
        half.z = half.z + z.sum(axis=1, dtype=np.float64)
        half.zz = half.zz + (z @ z.T).astype(np.float64)
        half.xz = half.xz + (x @ z.T).astype(np.float64)
        half.xx = half.xx + np.einsum("ip,ip->i", x, x, dtype=np.float64)


@dataclass(frozen=True)
class Centred:
    """Means and covariances. With `origin` False means are zero and covariances raw moments."""

    mean_z: np.ndarray
    mean_x: np.ndarray
    zz: np.ndarray
    xz: np.ndarray
    xx: np.ndarray

    def error(self, matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Mean squared error of x ~ matrix z + offset, per channel of x."""
        shift = self.mean_x - matrix @ self.mean_z - offset
        fitted = np.einsum("ij,ij->i", matrix @ self.zz, matrix)
        error: np.ndarray = self.xx - 2 * np.einsum("ij,ij->i", matrix, self.xz) + fitted
        return np.maximum(error, 0) + shift**2


def centred(half: Half, moments: Moments, intercept: bool) -> Centred:
    """Means and covariances of some places."""
    z, x = half.z / half.n, half.x / half.n
    zz = half.zz / half.n - np.outer(z, z)
    xz = half.xz / half.n - np.outer(x, z)
    xx = half.xx / half.n - np.asarray(x) ** 2
    z, x = z + moments.origin_z, x + moments.origin_x
    if intercept:
        return Centred(z, x, zz, xz, xx)
    none_z, none_x = np.zeros_like(z), np.zeros_like(x)
    return Centred(none_z, none_x, zz + np.outer(z, z), xz + np.outer(x, z), xx + x**2)


@dataclass(frozen=True)
class Fit:
    """x ~ matrix z + offset. error, plain: relative squared error of the inputs, weighted by what
    the layers make of them, on samples not fitted on: of this map and of plain slicing."""

    matrix: np.ndarray
    offset: np.ndarray
    strength: float
    error: float
    plain: float
    reason: str = ""


def fit(moments: Moments, kept: np.ndarray, importance: np.ndarray, intercept: bool) -> Fit:
    """The affine map from the pruned to the original channels.

    Ridge on the residual, min ||x - [z, 1][M; b]||^2 + strength ||M - E||^2, with E the plain
    slice (new channel j is old channel kept[j]): the less the samples say, the nearer to E. The
    strength is the one that does best on the half not fitted on. importance: (old channels).
    Plain slicing comes back, with a reason, where no map beats it or where the map explodes.
    """
    old, new = len(importance), len(kept)
    plain = np.zeros((old, new))
    plain[kept, np.arange(new)] = 1.0
    nothing = np.zeros(old)
    if not all(np.isfinite(v).all() for h in moments.halves for v in (h.zz, h.xz, h.xx)):
        return Fit(plain, nothing, np.inf, 1.0, 1.0, "its input is not finite")
    if moments.samples < 2:
        return Fit(plain, nothing, np.inf, 1.0, 1.0, "too few samples: one half must judge")
    halves = [centred(h, moments, intercept) for h in moments.halves]
    whole = centred(moments.halves[0] + moments.halves[1], moments, intercept)
    energy = float(importance @ (whole.xx + (0 if intercept else 1e-30))) or 1e-30

    def loss(there: Centred, matrix: np.ndarray, offset: np.ndarray) -> float:
        return float(importance @ there.error(matrix, offset)) / energy / 2

    before = sum(loss(h, plain, nothing) for h in halves)

    def judged(strength: float) -> float:
        """The loss of the map fitted on either half, on the other half."""
        error = 0.0
        for here, there in (halves, halves[::-1]):
            matrix = solved(here, plain, kept, strength)
            error += loss(there, matrix, offset_of(here, matrix, intercept))
        return error

    error, strength = downhill(judged, STRENGTHS, START)
    if error >= before:
        return Fit(plain, nothing, np.inf, before, before, "no map does better on samples held out")
    matrix = solved(whole, plain, kept, strength)
    spread_z, spread_x = np.sqrt(np.diag(whole.zz)), np.sqrt(np.maximum(whole.xx, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.abs(matrix - plain) * spread_z[None] / spread_x[:, None]
    largest = float(np.max(scale, initial=0.0, where=np.isfinite(scale)))
    if largest > LARGEST:
        reason = f"the map explodes: a factor of {largest:.0f} standard deviations"
        return Fit(plain, nothing, np.inf, before, before, reason)
    return Fit(matrix, offset_of(whole, matrix, intercept), strength, error, before)


def downhill(
    judged: Callable[[float], float], ladder: tuple[float, ...], start: int
) -> tuple[float, float]:
    """The least value on a ladder, and where, walking from a start while it falls."""
    values = {start: judged(ladder[start])}
    for step in (1, -1):
        at = start + step
        while 0 <= at < len(ladder):
            values[at] = judged(ladder[at])
            if values[at] >= values[at - step]:
                break
            at += step
        if min(values, key=lambda k: values[k]) != start:
            break
    best = min(values, key=lambda k: values[k])
    return values[best], ladder[best]


def solved(here: Centred, plain: np.ndarray, kept: np.ndarray, strength: float) -> np.ndarray:
    """M = E + (S_xz - E S_zz) (S_zz + strength * mean variance * I)^-1."""
    size = len(kept)
    variance = float(np.trace(here.zz)) / max(size, 1)
    if not np.isfinite(strength) or variance <= 0:
        return plain
    residual = here.xz.copy()
    residual[kept] -= here.zz
    system = here.zz + strength * variance * np.eye(size)
    return plain + np.linalg.solve(system, residual.T).T


def offset_of(here: Centred, matrix: np.ndarray, intercept: bool) -> np.ndarray:
    return here.mean_x - matrix @ here.mean_z if intercept else np.zeros(len(here.mean_x))
