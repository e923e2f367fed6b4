"""Structured Optimal Brain Surgeon: what the layers lose that read a unit, at best.

Without the channels B of its input x, a layer y = W x loses at least
tr(W_B (G^-1_BB)^-1 W_B^T) of its output's energy when the other channels take over what they can
(Hassibi & Stork 1993 in the form of ZipLM, 2302.04089, equation 3); G are the second moments of x.
Relative to tr(W G W^T) this is comparable between layers. After every chunk of units G^-1 and W
are updated, so that of two channels that can replace each other only one is cheap.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgewright.mixers import Mixer

CHUNK = 0.05  # of a group's units removed between two updates
STRENGTH = 1e-3  # added to the diagonal at least, of its mean: as in the compensation
LARGEST_PART = 0.99  # of the moments given up for the mean variance


@dataclass(frozen=True)
class Reader:
    """An activation and the layers that read it. labels: (n,) unit of each channel. gram: (n, n)
    second moments. outer: (n, n) sum over the layers of W^T W / tr(W G W^T). power: (n,) raw
    mean squares. places: what the moments were taken over. mean: (n,), zeros for raw moments.
    mixers: the layers."""

    labels: np.ndarray
    gram: np.ndarray
    outer: np.ndarray
    power: np.ndarray
    places: int
    mean: np.ndarray | None = None
    mixers: tuple[Mixer, ...] = ()


@dataclass
class State:
    """The inverse of a reader's moments and its outer product, as channels go."""

    inverse: np.ndarray
    outer: np.ndarray
    places: dict[int, np.ndarray]  # unit -> its channels

    def loss(self, unit: int) -> float:
        """What the readers lose with this unit now."""
        at = self.places.get(unit)
        if at is None:
            return 0.0
        if len(at) == 1:
            return float(self.outer[at[0], at[0]] / self.inverse[at[0], at[0]])
        block = np.ix_(at, at)
        return float(np.trace(np.linalg.solve(self.inverse[block], self.outer[block])))

    def remove(self, units: Sequence[int]) -> None:
        """Take channels away: the others take over, W <- W - W_B (G^-1_BB)^-1 G^-1_B:."""
        parts = [self.places[u] for u in units if u in self.places]
        if not parts:
            return
        at = np.concatenate(parts)
        take = np.linalg.solve(self.inverse[np.ix_(at, at)], self.inverse[at])  # (B, n)
        self.inverse -= self.inverse[:, at] @ take
        left = self.outer[at]  # (B, n) rows of W^T W
        self.outer -= take.T @ left
        self.outer -= self.outer[:, at] @ take
        # Nothing is left of what went; rounding must not bring it back.
        for matrix in (self.inverse, self.outer):
            matrix[at], matrix[:, at] = 0.0, 0.0


def losses(readers: Sequence[Reader], units: Sequence[int]) -> dict[int, float]:
    """Unit -> loss at the moment it goes, least first; never falling in the order of removal."""
    states = [state_of(r, units) for r in readers]
    left, found, floor = list(units), {}, 0.0
    chunk = max(1, round(CHUNK * len(units)))
    while left:
        cost = {u: sum(s.loss(u) for s in states) for u in left}
        gone = sorted(left, key=lambda u: (cost[u], u))[:chunk]
        for unit in gone:
            floor = max(floor, cost[unit])
            found[unit] = floor
        left = [u for u in left if u not in found]
        if left:
            for state in states:
                state.remove(gone)
    return found


def state_of(reader: Reader, units: Sequence[int]) -> State:
    size = len(reader.labels)
    inverse = np.linalg.inv(reader.gram + ridge(reader.gram, reader.places) * np.eye(size))
    wanted = set(units)
    places: dict[int, list[int]] = {}
    for k, label in enumerate(reader.labels.tolist()):
        if label in wanted:
            places.setdefault(label, []).append(k)
    return State(inverse, reader.outer.copy(), {u: np.array(p) for u, p in places.items()})


def taken_over(reader: Reader, gone: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x ~ M x + c from the channels that stay: M (n, n) with zero columns for those `gone`
    (boolean), c (n,)."""
    stay = ~gone
    system = reader.gram[np.ix_(stay, stay)]
    system = system + ridge(reader.gram, reader.places) * np.eye(len(system))
    matrix = np.eye(len(gone))
    matrix[:, gone] = 0.0
    matrix[np.ix_(gone, stay)] = np.linalg.solve(system, reader.gram[np.ix_(stay, gone)]).T
    mean = reader.mean if reader.mean is not None else np.zeros(len(gone))
    return matrix, mean - matrix @ mean


def ridge(gram: np.ndarray, places: int) -> float:
    """What to add to the diagonal: with few places moments show relations that are not there.

    The part r of the oracle approximating shrinkage towards the mean variance (Chen et al. 2010,
    0907.4698, equation 23), as r / (1 - r) of that variance, and never below STRENGTH.
    """
    size = len(gram)
    trace, square = float(np.trace(gram)), float(np.sum(gram * gram))
    mean = trace / size
    if mean <= 0:
        return 1.0
    over = (places + 1 - 2 / size) * (square - trace * trace / size)
    part = ((1 - 2 / size) * square + trace * trace) / over if over > 0 else 1.0
    part = min(part, LARGEST_PART)
    return mean * max(STRENGTH, part / (1 - part))
