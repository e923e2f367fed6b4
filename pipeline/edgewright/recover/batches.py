"""Calibration samples as batches: which samples a step sees, stacked where the model allows it."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import onnx
import torch

from edgewright.data import Feed
from edgewright.errors import BadInput
from edgewright.recover.ops import Tensor
from edgewright.recover.variants import MEMORY
from edgewright.runtime.local import open_local
from edgewright.taps import expose

FEWEST = 5
SAME = 1e-3  # a stacked run may differ by this share of the largest value: another order of sums


class Student(Protocol):
    """What is trained: its weights by name, its outputs, and a run that gives named tensors."""

    weights: dict[str, torch.nn.Parameter]
    outputs: tuple[str, ...]

    def __call__(self, feeds: Mapping[str, Tensor], wanted: Sequence[str]) -> list[Tensor]: ...


# Gives the named tensors of the original for a feed.
Teacher = Callable[[Feed, Sequence[str]], Sequence[np.ndarray]]


class Wrapped(torch.nn.Module):
    """Any torch module as a student: called with its inputs in order, outputs named in order."""

    def __init__(
        self, module: torch.nn.Module, inputs: Sequence[str], outputs: Sequence[str]
    ) -> None:
        super().__init__()
        self.module, self.inputs, self.outputs = module, tuple(inputs), tuple(outputs)
        self.weights = {n: p for n, p in module.named_parameters() if p.requires_grad}

    def forward(self, feeds: Mapping[str, Tensor], wanted: Sequence[str]) -> list[Tensor]:
        result = self.module(*[feeds[n] for n in self.inputs])
        values = result if isinstance(result, tuple | list) else (result,)
        named = dict(zip(self.outputs, values, strict=True))
        return [named[n] for n in wanted]


def runtime_teacher(model: onnx.ModelProto, wanted: Sequence[str], threads: int) -> Teacher:
    """The original in ONNX Runtime, with the wanted tensors as outputs."""
    session = open_local(expose(model, list(wanted)).SerializeToString(), threads=threads)
    return lambda feed, names: session.run(feed, list(names))


def take_samples(feeds: Iterable[Feed], limit: int) -> tuple[list[Feed], str]:
    """At most `limit` samples and MEMORY bytes, and what was left out, in words."""
    kept: list[Feed] = []
    size = 0
    for feed in feeds:
        need = sum(v.nbytes for v in feed.values())
        if len(kept) >= limit or (kept and size + need > MEMORY):
            return kept, f"training uses the first {len(kept)} samples ({size >> 20} MiB)"
        kept.append(
            {n: np.require(v, requirements=["C", "W"]) for n, v in feed.items()}
        )  # torch writes
        size += need
    if len(kept) < FEWEST:
        raise BadInput(
            "too few calibration samples to train on",
            expected=f"at least {FEWEST}, better a few hundred",
            found=str(len(kept)),
        )
    return kept, ""


def digest_of(feeds: Iterable[Feed], *parts: bytes) -> str:
    """Hash of the samples and whatever else decides what training does."""
    total = hashlib.sha256(torch.__version__.encode())
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    for feed in feeds:
        for name, value in sorted(feed.items()):
            total.update(f"{name}{value.dtype}{value.shape}".encode() + value.tobytes())
    return total.hexdigest()


def stack(feeds: Sequence[Feed]) -> Feed:
    """Feeds of equal shapes as one, along the first axis; numbers without axes stay single."""
    first = feeds[0]
    return {
        name: np.concatenate([f[name] for f in feeds]) if value.ndim else value
        for name, value in first.items()
    }


def shapes_of(feed: Feed) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What two feeds must share to be stacked: shapes, and numbers without axes."""
    return tuple(
        (n, v.shape if v.ndim else (int(v.view(np.uint8).sum()),)) for n, v in sorted(feed.items())
    )


def tensors(feed: Feed) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in feed.items()}


def stacking(
    run: Callable[[Feed], Sequence[np.ndarray]], feeds: Sequence[Feed]
) -> list[int] | None:
    """Along which axis each value of a run of two samples holds the two samples' own values.

    Not always the first: recurrent layers have time there. None where a run of two gives
    anything else, or where no two samples are alike.
    """
    alike: dict[object, list[Feed]] = {}
    for feed in feeds:
        alike.setdefault(shapes_of(feed), []).append(feed)
    pair = next((group[:2] for group in alike.values() if len(group) > 1), None)
    if pair is None:
        return None
    alone = [run(feed) for feed in pair]
    try:
        together = run(stack(pair))
    except BadInput:
        return None
    axes = []
    for first, second, both in zip(*alone, together, strict=True):
        axis = longer_axis(first.shape, both.shape)
        if axis is None or first.shape != second.shape:
            return None
        want = np.concatenate([first, second], axis)
        if not np.allclose(want, both, rtol=0, atol=SAME * (np.abs(want).max() + 1e-6)):
            return None
        axes.append(axis)
    return axes


def longer_axis(one: tuple[int, ...], two: tuple[int, ...]) -> int | None:
    """The only axis in which the shapes differ, where the second is twice as long."""
    if len(one) != len(two):
        return None
    differ = [k for k, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    return differ[0] if len(differ) == 1 and two[differ[0]] == 2 * one[differ[0]] else None


class Pair:
    """Student and teacher side by side on the same samples.

    wanted: (student's tensor, teacher's tensor) pairs that `both` returns. feeds: what rows are
    numbers in. samples: some of them, to see how they stack (default: all).
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        wanted: Sequence[tuple[str, str]],
        feeds: Sequence[Feed],
        samples: Sequence[Feed] | None = None,
    ) -> None:
        self.student, self.teacher, self.feeds = student, teacher, feeds
        self.mine, self.theirs = [a for a, _ in wanted], [b for _, b in wanted]
        samples = feeds if samples is None else samples
        axes = stacking(self.run_student, samples)
        self.stacked = axes is not None
        self.axes = axes or [0] * len(self.mine)
        self.teacher_stacked = self.stacked and stacking(self.run_teacher, samples) == axes
        self.known: dict[tuple[int, ...], list[np.ndarray]] = {}
        self.room = MEMORY

    def run_student(self, feed: Feed) -> list[np.ndarray]:
        with torch.no_grad():
            return [v.numpy() for v in self.student(tensors(feed), self.mine)]

    def run_teacher(self, feed: Feed) -> list[np.ndarray]:
        names = list(dict.fromkeys(self.theirs))
        found = dict(zip(names, self.teacher(feed, names), strict=True))
        return [found[n] for n in self.theirs]

    def groups(self, rows: Sequence[int]) -> list[list[int]]:
        """The samples in groups that can run at once."""
        if not self.stacked:
            return [[k] for k in rows]
        found: dict[object, list[int]] = {}
        for k in rows:
            found.setdefault(shapes_of(self.feeds[k]), []).append(k)
        return list(found.values())

    def both(
        self, rows: Sequence[int], mix: np.random.Generator | None = None, again: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The wanted tensors of student and teacher for one group of samples.

        mix: draws how much of another sample each one gets; the teacher sees the mixture too
        (Beyer et al., A good teacher is patient and consistent, 2106.05237). again: this group
        will be asked for again, unmixed: what the teacher says is remembered, up to MEMORY bytes.
        """
        feeds = [self.feeds[k] for k in rows]
        feed = stack(feeds) if len(feeds) > 1 else feeds[0]
        if mix is not None and len(feeds) > 1:
            share, order = np.float32(mix.uniform(0, 0.5)), mix.permutation(len(feeds))
            for name, value in feed.items():
                if value.ndim and value.dtype == np.float32:
                    feed[name] = (1 - share) * value + share * stack([feeds[k] for k in order])[
                        name
                    ]
        mine = self.student(tensors(feed), self.mine)
        theirs = self.known.get(tuple(rows)) if again else None
        if theirs is None:
            theirs = self.answers(feed, len(feeds))
            size = sum(v.nbytes for v in theirs)
            if again and size <= self.room:
                self.known[tuple(rows)] = theirs
                self.room -= size
        return mine, [torch.from_numpy(np.array(v)) for v in theirs]

    def answers(self, feed: Feed, size: int) -> list[np.ndarray]:
        """The teacher's tensors for `size` samples, one after the other where it must be."""
        if size == 1 or self.teacher_stacked:
            return self.run_teacher(feed)
        parts = [
            self.run_teacher({n: v[k : k + 1] if v.ndim else v for n, v in feed.items()})
            for k in range(size)
        ]
        values = zip(self.axes, *parts, strict=True)
        return [np.concatenate(rows, axis) for axis, *rows in values]


def rows_of_step(train: Sequence[int], batch: int, step: int, seed: int) -> list[tuple[int, int]]:
    """The samples of a step: all of them once in a new order, then again in another; with each
    how often all were seen before."""
    count = len(train)
    rows: list[tuple[int, int]] = []
    for epoch in range(step * batch // count, ((step + 1) * batch - 1) // count + 1):
        order = np.random.default_rng([seed, 1, epoch]).permutation(count)
        begin, end = step * batch - epoch * count, (step + 1) * batch - epoch * count
        rows += [(train[k], epoch) for k in order[max(0, begin) : max(0, end)]]
    return rows
