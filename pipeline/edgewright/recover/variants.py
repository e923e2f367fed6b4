"""More inputs to learn from, made of the ones there are.

The original answers whatever it is shown, so a made-up input needs no label, and need not look
real: it has to keep the pruned graph from learning its few samples by heart. Nothing is known of
what the inputs mean, so only this is done: pieces of another sample take the place of the own
ones, what lies along an axis is stretched, values grow, shrink and shift. Numbers that stand for
things (tokens) are joined, the beginning of one sample and the end of another.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from edgewright.data import Feed
from edgewright.recipe import FEW, HOLD

MEMORY = 512 << 20  # bytes of samples kept at most, to make others of or to train on
LATELY = 32  # variants kept for who asks for them again soon
ENDLESS = 1 << 40
PIECE = (0.25, 0.75)  # share of an axis that comes from another sample
STRETCH = (0.8, 1.25)
CONTRAST = (0.6, 1.3)
SHIFT = 0.3  # at most, in standard deviations of the sample
OFTEN = 0.5  # chance of a piece, of a change of values, and of a whole cross-section


@dataclass(frozen=True)
class Pool:
    """Samples to make others of. bases: those that can be varied. alike: values of an input of one
    shape, by both; ends: the least and the largest number in them. seed: of all that is drawn."""

    samples: Sequence[Feed]
    bases: Sequence[Feed]
    alike: dict[tuple[str, tuple[int, ...]], list[np.ndarray]]
    ends: dict[tuple[str, tuple[int, ...]], tuple[float, float]]
    seed: int

    def variant(self, number: int) -> Feed:
        """A new feed, always the same one, with the shapes of base `number` modulo their count."""
        rng = np.random.default_rng([self.seed, 2, number])
        feed = self.bases[number % len(self.bases)]
        if whole(feed):
            return joined(feed, self.samples, rng)
        new = dict(feed)
        for name, value in feed.items():
            if spatial(value):
                key = name, value.shape
                new[name] = varied(value, self.alike[key], self.ends[key], rng)
        return new


def make_pool(samples: Sequence[Feed], seed: int) -> Pool:
    """What variants of these samples are made of; no bases where none can be varied."""
    alike: dict[tuple[str, tuple[int, ...]], list[np.ndarray]] = {}
    for sample in samples:
        for name, value in sample.items():
            if spatial(value):
                alike.setdefault((name, value.shape), []).append(value)
    ends = {k: (min(v.min() for v in p), max(v.max() for v in p)) for k, p in alike.items()}
    return Pool(samples, [s for s in samples if can_vary(s)], alike, ends, seed)


def with_variants(feeds: Iterable[Feed], vary: int, seed: int = 0) -> Iterator[Feed]:
    """The feeds, then `vary` variants of each: of none where there are more than FEW or MEMORY.

    Who judges what was learned from every other sample by the rest goes on doing so: in even
    places stands what was made of samples in even places.
    """
    kept: list[Feed] | None = [] if vary else None
    count = size = 0
    for feed in feeds:
        count += 1
        size += sum(value.nbytes for value in feed.values())
        if kept is not None and count <= FEW and size <= MEMORY:
            kept.append(feed)
        else:
            kept = None
        yield feed
    pools = [make_pool(part, seed) for part in ((kept or [])[::2], (kept or [])[1::2])]
    if all(pool.bases for pool in pools):
        for number in range(vary * min(len(pool.bases) for pool in pools)):
            yield pools[count % 2].variant(number)
            yield pools[1 - count % 2].variant(number)


def variable(samples: Sequence[Feed], vary: int) -> bool:
    """Whether variants can be made of the samples that training holds out, and of the others."""
    held = [can_vary(s) for s in samples[HOLD - 1 :: HOLD]]
    rest = [can_vary(s) for k, s in enumerate(samples) if k % HOLD != HOLD - 1]
    return vary > 0 and len(samples) <= FEW and any(held) and any(rest)


def can_vary(sample: Feed) -> bool:
    return whole(sample) or any(spatial(value) for value in sample.values())


class Grown(Sequence[Feed]):
    """Samples, behind them some variants of one pool, behind those endless ones of another."""

    def __init__(self, samples: Sequence[Feed], some: Pool, limit: int, more: Pool) -> None:
        self.samples, self.some, self.limit, self.more = samples, some, limit, more
        self.made = lru_cache(LATELY)(self.make)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, place: int) -> Feed:  # type: ignore[override]
        number = place - len(self.samples)
        return self.samples[place] if number < 0 else self.made(number)

    def make(self, number: int) -> Feed:
        some = number < self.limit
        return self.some.variant(number) if some else self.more.variant(number - self.limit)


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
