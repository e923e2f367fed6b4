"""More inputs to learn from, made of the ones there are.

The original answers whatever it is shown, so a made-up input needs no label, and need not look
real: it has to keep the pruned graph from learning its few samples by heart. Nothing is known of
what the inputs mean, so only this is done: pieces of another sample take the place of the own
ones, what lies along an axis is stretched, values grow, shrink and shift. Numbers that stand for
things (tokens) are joined, the beginning of one sample and the end of another.
"""

from collections.abc import Sequence

import numpy as np

from edgewright.data import Feed

PIECE = (0.25, 0.75)  # share of an axis that comes from another sample
STRETCH = (0.8, 1.25)
CONTRAST = (0.6, 1.3)
SHIFT = 0.3  # at most, in standard deviations of the sample
OFTEN = 0.5  # chance of a piece, of a change of values, and of a whole cross-section


def variants(samples: Sequence[Feed], count: int, seed: int, room: int) -> list[Feed]:
    """New feeds with the shapes of the samples they start from, in their order, `count` at most.

    Fewer where they would take more than `room` bytes, or where a sample has no input that can be
    varied.
    """
    found: list[Feed] = []
    pools: dict[tuple[str, tuple[int, ...]], list[np.ndarray]] = {}
    for sample in samples:
        for name, value in sample.items():
            if spatial(value):
                pools.setdefault((name, value.shape), []).append(value)
    ends = {key: (min(v.min() for v in p), max(v.max() for v in p)) for key, p in pools.items()}
    for k in range(count if samples else 0):
        rng = np.random.default_rng([seed, 2, k])
        feed = samples[k % len(samples)]
        new = joined(feed, samples, rng) if whole(feed) else feed
        for name, value in feed.items():
            if (key := (name, value.shape)) in pools and spatial(value):
                new = {**new, name: varied(value, pools[key], ends[key], rng)}
        if new is feed:
            continue
        room -= sum(value.nbytes for value in new.values())
        if room < 0:
            break
        found.append(new)
    return found


def spatial(value: np.ndarray) -> bool:
    """Whether it is one sample with channels and at least one axis behind them."""
    return value.dtype == np.float32 and value.ndim >= 3 and value.shape[0] == 1


def whole(feed: Feed) -> bool:
    """Whether all inputs are one sample of whole numbers along one common axis, the second."""
    shapes = {v.shape for v in feed.values()}
    if len(shapes) != 1 or any(v.dtype.kind not in "iu" for v in feed.values()):
        return False
    (shape,) = shapes
    return len(shape) == 2 and shape[0] == 1 and shape[1] > 1


def joined(feed: Feed, samples: Sequence[Feed], rng: np.random.Generator) -> Feed:
    """The beginning of a sample and the end of another one that is long enough."""
    size = next(iter(feed.values())).shape[1]
    cut = int(rng.integers(1, size))
    long = [s for s in samples if whole(s) and next(iter(s.values())).shape[1] >= size - cut]
    other = long[int(rng.integers(len(long)))]
    return {n: np.concatenate([v[:, :cut], other[n][:, cut - size :]], 1) for n, v in feed.items()}


def varied(
    value: np.ndarray,
    pool: Sequence[np.ndarray],
    ends: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:
    """One sample, float32 (1, channels, ...), changed; values stay within the pool's two ends."""
    axes = range(2, value.ndim)
    new = value.copy()
    if rng.uniform() < OFTEN:
        other = pool[int(rng.integers(len(pool)))]
        alone = rng.choice(axes) if rng.uniform() < OFTEN else None
        box = [slice(None)] * value.ndim
        for axis in axes:
            if alone is None or axis == alone:
                size = max(1, int(value.shape[axis] * rng.uniform(*PIECE)))
                begin = int(rng.integers(value.shape[axis] - size + 1))
                box[axis] = slice(begin, begin + size)
        new[tuple(box)] = other[tuple(box)]
    for axis in axes:
        new = stretched(new, axis, rng.uniform(*STRETCH), rng.uniform())
    if rng.uniform() < OFTEN:
        mean = new.mean()
        new = mean + (new - mean) * rng.uniform(*CONTRAST) + new.std() * rng.uniform(-SHIFT, SHIFT)
    return np.ascontiguousarray(np.clip(new, *ends), np.float32)


def stretched(value: np.ndarray, axis: int, factor: float, place: float) -> np.ndarray:
    """As long as before, what it shows longer or shorter; the ends repeat where it is shorter.

    place: 0 keeps the beginning where it is, 1 the end.
    """
    size = value.shape[axis]
    at = (np.arange(size) - place * (size - 1)) / factor + place * (size - 1)
    at = np.clip(at, 0, size - 1)
    low = np.floor(at).astype(int)
    shape = [1] * value.ndim
    shape[axis] = -1
    part = (at - low).astype(np.float32).reshape(shape)
    high = np.minimum(low + 1, size - 1)
    return np.take(value, low, axis) * (1 - part) + np.take(value, high, axis) * part
