"""More inputs to learn from, made of the ones there are.

The original answers whatever it is shown, so a made-up input needs no label, and need not look
real: it has to keep the pruned graph from learning its few samples by heart. Which samples are made
of which is said here, how they change in `distortions`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from edgewright.data import Feed
from edgewright.recipe import FEW, HOLD
from edgewright.recover.distortions import joined, remade, scrambled, varied

MEMORY = 512 << 20  # bytes of samples kept at most, to make others of or to train on
LATELY = 32  # variants kept for who asks for them again soon
ENDLESS = 1 << 40


@dataclass(frozen=True)
class Pool:
    """Samples to make others of. bases: those that can be varied. alike: values of an input of one
    shape, by both; ends: the least and the largest number in them. seed: of all that is drawn.
    wild: whether variants may be far from any sample."""

    samples: Sequence[Feed]
    bases: Sequence[Feed]
    alike: dict[tuple[str, tuple[int, ...]], list[np.ndarray]]
    ends: dict[tuple[str, tuple[int, ...]], tuple[float, float]]
    seed: int
    wild: bool = False

    def variant(self, number: int) -> Feed:
        """A new feed, always the same one, with the shapes of base `number` modulo their count."""
        rng = np.random.default_rng([self.seed, 2, number])
        feed = self.bases[number % len(self.bases)]
        if whole(feed):
            others = [s for s in self.samples if whole(s)]
            return (scrambled if self.wild else joined)(feed, others, rng)
        new = dict(feed)
        for name, value in feed.items():
            if spatial(value):
                key = name, value.shape
                change = remade if self.wild else varied
                new[name] = change(value, self.alike[key], self.ends[key], rng)
        return new


def make_pool(samples: Sequence[Feed], seed: int, wild: bool = False) -> Pool:
    """What variants of these samples are made of; no bases where none can be varied."""
    alike: dict[tuple[str, tuple[int, ...]], list[np.ndarray]] = {}
    for sample in samples:
        for name, value in sample.items():
            if spatial(value):
                alike.setdefault((name, value.shape), []).append(value)
    ends = {k: (min(v.min() for v in p), max(v.max() for v in p)) for k, p in alike.items()}
    return Pool(samples, [s for s in samples if can_vary(s)], alike, ends, seed, wild)


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
