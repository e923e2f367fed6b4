"""How one sample becomes another one: a little (`varied`) or beyond recognition (`remade`).

Nothing is known of what the inputs mean, and the original answers whatever it is shown. What
least squares are fitted on should stay near the samples: pieces of another sample take the place
of the own ones, what lies along an axis is stretched, values grow, shrink and shift. What is
trained on for long had better be as diverse as it can: far closer looks, other samples put together
piece by piece, other colours. A small part of few samples, seen in ever other ways, teaches most
of what many samples would (Asano and Saeed, The augmented image prior, 2112.00725).

Samples are float32 (1, channels, ...), one or more axes behind the channels; values stay within the
two ends of the pool. Numbers that stand for things (tokens) are (1, length), in several inputs.
"""

from collections.abc import Sequence

import numpy as np

from edgewright.data import Feed

PIECE = (0.25, 0.75)  # share of an axis that comes from another sample
STRETCH = (0.8, 1.25)
CLOSER = (0.3, 1.0)  # share of an axis that a close look shows
UNEVEN = (0.85, 1.18)  # of one axis against the others
CONTRAST = (0.6, 1.3)
SHIFT = 0.3  # at most, in standard deviations of the sample
COLOUR = (0.7, 1.3)
TINT = 0.2  # at most, in standard deviations of the sample, for each channel
COLOURS = 4  # channels at most that are coloured each for itself
PART = (0.2, 0.67)  # share of an axis that one of several pieces takes
LEAST = 0.05  # share of an axis that is too short for one more piece
SHORTER = 0.5  # share of an axis that is filled at least where samples end in padding
INVERTED = 0.2  # chance that a piece is turned into its negative
ACROSS = (0.7, 1.18)  # of a piece, along the axes that it is not a piece of
SLANT = 0.4  # at most: how far what lies along one axis moves for each place along the next
SLANTED = 0.3  # chance of that, where a piece has the axes
REVERSED = 0.2  # chance that an axis runs the other way, for each
BLEND = (0.2, 0.5)  # share of the other sample where two are laid over each other
BLENDED = 0.2  # chance of that, where another one takes part
COLOURED = 0.3
OFTEN = 0.5  # chance of everything else
OTHERS = 0.3  # share of tokens at most that are replaced by any other

Ends = tuple[float, float]
Random = np.random.Generator


def varied(value: np.ndarray, pool: Sequence[np.ndarray], ends: Ends, rng: Random) -> np.ndarray:
    """A sample, changed a little."""
    axes = range(2, value.ndim)
    new = value
    if rng.uniform() < OFTEN:
        new = pasted(new, pool[int(rng.integers(len(pool)))], rng)
    for axis in axes:
        new = stretched(new, axis, rng.uniform(*STRETCH), rng.uniform())
    if rng.uniform() < OFTEN:
        new = shaded(new, rng)
    return np.ascontiguousarray(np.clip(new, *ends), np.float32)


def remade(value: np.ndarray, pool: Sequence[np.ndarray], ends: Ends, rng: Random) -> np.ndarray:
    """Another sample: of several ones' pieces in a row, or a look at one of them."""
    sizes = value.shape[2:]
    if rng.uniform() < max(sizes) / sum(sizes):  # a long thing is a row of things
        new = pieced(value, pool, ends, rng)
    else:
        new = reversed_at_times(looked_at(value, rng), rng)
        if rng.uniform() < OFTEN:
            other = looked_at(pool[int(rng.integers(len(pool)))], rng)
            if rng.uniform() < BLENDED:
                share = rng.uniform(*BLEND)
                new = (1 - share) * new + share * other
            else:
                new = pasted(new, other, rng)
        if rng.uniform() < OFTEN:
            new = shaded(new, rng)
        if value.shape[1] <= COLOURS and rng.uniform() < COLOURED:
            shape = (1, value.shape[1]) + (1,) * (value.ndim - 2)
            new = new * rng.uniform(*COLOUR, shape) + new.std() * rng.uniform(-TINT, TINT, shape)
    return np.ascontiguousarray(np.clip(new, *ends), np.float32)


def pasted(value: np.ndarray, other: np.ndarray, rng: Random) -> np.ndarray:
    """A box of another sample in its own place; half of the time along one axis only."""
    axes = range(2, value.ndim)
    alone = rng.choice(axes) if rng.uniform() < OFTEN else None
    box = [slice(None)] * value.ndim
    for axis in axes:
        if alone is None or axis == alone:
            size = max(1, int(value.shape[axis] * rng.uniform(*PIECE)))
            begin = int(rng.integers(value.shape[axis] - size + 1))
            box[axis] = slice(begin, begin + size)
    new = value.copy()
    new[tuple(box)] = other[tuple(box)]
    return new


def shaded(value: np.ndarray, rng: Random) -> np.ndarray:
    mean = value.mean()
    shift = value.std() * rng.uniform(-SHIFT, SHIFT)
    return np.asarray(mean + (value - mean) * rng.uniform(*CONTRAST) + shift)


def stretched(value: np.ndarray, axis: int, factor: float, place: float) -> np.ndarray:
    """As long as before, what it shows longer or shorter; the ends repeat where it is shorter.

    place: 0 keeps the beginning where it is, 1 the end.
    """
    size = value.shape[axis]
    return taken(value, axis, (np.arange(size) - place * (size - 1)) / factor + place * (size - 1))


def taken(value: np.ndarray, axis: int, at: np.ndarray) -> np.ndarray:
    """What an axis holds at these places (count), between two indices in proportion."""
    size = value.shape[axis]
    at = np.clip(at, 0, size - 1)
    low = np.floor(at).astype(int)
    shape = [1] * value.ndim
    shape[axis] = -1
    part = (at - low).astype(np.float32).reshape(shape)
    high = np.minimum(low + 1, size - 1)
    return np.take(value, low, axis) * (1 - part) + np.take(value, high, axis) * part


def looked_at(value: np.ndarray, rng: Random) -> np.ndarray:
    """A part of a sample as large as the whole, or the whole with a margin."""
    share = rng.uniform(*CLOSER if rng.uniform() < OFTEN else STRETCH)
    for axis in range(2, value.ndim):
        one, size = share * rng.uniform(*UNEVEN), value.shape[axis]
        begin = rng.uniform(min(0.0, 1 - one), max(0.0, 1 - one)) * size
        value = taken(value, axis, begin + np.arange(size) * one)
    return value


def pieced(value: np.ndarray, pool: Sequence[np.ndarray], ends: Ends, rng: Random) -> np.ndarray:
    """Pieces of any samples behind each other, each stretched, slanted, turned round and shaded its
    own way.

    Along one axis, a long one rather than a short one. Where the sample at hand ends in padding,
    so may the new one, and no padding is in between.
    """
    sizes = np.array(value.shape[2:])
    axis = 2 + int(rng.choice(len(sizes), p=sizes / sizes.sum()))
    size = value.shape[axis]
    padded = used(value, axis) < size
    room = int(size * rng.uniform(SHORTER, 1)) if padded and rng.uniform() < OFTEN else size
    rest = size - room
    parts: list[np.ndarray] = []
    while room > LEAST * size or not parts:
        source = pool[int(rng.integers(len(pool)))]
        whole = used(source, axis)
        length = min(whole, max(1, int(size * rng.uniform(*PART))))
        begin = int(rng.integers(whole - length + 1))
        new = min(room, max(1, round(length * rng.uniform(*STRETCH))))
        part = taken(source, axis, np.linspace(begin, begin + length - 1, new))
        for other in range(2, value.ndim):
            if other != axis:
                part = stretched(part, other, rng.uniform(*ACROSS), rng.uniform())
        part = reversed_at_times(part, rng)
        if axis > 2 and rng.uniform() < SLANTED:
            part = slanted(part, axis, rng.uniform(-SLANT, SLANT))
        if rng.uniform() < OFTEN:
            part = shaded(part, rng)
        if rng.uniform() < INVERTED:
            part = ends[0] + ends[1] - part
        parts.append(part)
        room -= new
    last = np.take(value if padded else parts[-1], [-1], axis)
    return np.concatenate([*parts, np.repeat(last, rest + room, axis)], axis)


def reversed_at_times(value: np.ndarray, rng: Random) -> np.ndarray:
    """Each axis the other way round or not: what it shows is new, its parts are the same."""
    return np.flip(value, tuple(a for a in range(2, value.ndim) if rng.uniform() < REVERSED))


def slanted(value: np.ndarray, axis: int, by: float) -> np.ndarray:
    """Each place along the axis before moved along this one, the middle not at all."""
    count, size = value.shape[axis - 1], value.shape[axis]
    moved = by * (np.arange(count) - (count - 1) / 2)
    rows = [
        taken(np.take(value, [k], axis - 1), axis, np.arange(size) + moved[k]) for k in range(count)
    ]
    return np.concatenate(rows, axis - 1)


def used(value: np.ndarray, axis: int) -> int:
    """Length of an axis without the padding at its end, which is one number all over.

    All of it where nothing else is there, or too little of that to be padding.
    """
    rows = np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)
    live = np.flatnonzero((rows != rows[-1, 0]).any(axis=1))
    end = int(live[-1]) + 1 if len(live) else len(rows)
    return end if len(rows) - end > max(1, LEAST * len(rows)) else len(rows)


def joined(feed: Feed, samples: Sequence[Feed], rng: Random) -> Feed:
    """The beginning of a sample of tokens and the end of another one that is long enough."""
    size = length_of(feed)
    cut = int(rng.integers(1, size))
    long = [s for s in samples if length_of(s) >= size - cut]
    other = long[int(rng.integers(len(long)))]
    return {n: np.concatenate([v[:, :cut], other[n][:, cut - size :]], 1) for n, v in feed.items()}


def scrambled(feed: Feed, samples: Sequence[Feed], rng: Random) -> Feed:
    """Two samples of tokens joined twice, and some places between the ends taken from anywhere."""
    new = joined(joined(feed, samples, rng), samples, rng)
    size = length_of(new)
    often = rng.uniform(0, OTHERS)
    for place in range(1, size - 1):
        if rng.uniform() < often:
            other = samples[int(rng.integers(len(samples)))]
            at = int(rng.integers(length_of(other)))
            for name, value in new.items():
                value[:, place] = other[name][:, at]
    return new


def length_of(feed: Feed) -> int:
    return int(next(iter(feed.values())).shape[1])
