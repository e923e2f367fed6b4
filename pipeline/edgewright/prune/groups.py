"""Units and groups: labels from the tied ids, and units that look the same everywhere.

A group holds the units with one signature: the multiset of (tensor, axis) they have indices on,
activations included. So every axis that has one unit of a group has all of them, and a group
that keeps a unit leaves no axis empty. Grouping by connected axes would not do: through a
Concat, one convolution could lose all it has while others keep theirs.
"""

from dataclasses import dataclass

import numpy as np

from edgewright.prune.axes import Axes

FINE = 4
Labels = dict[str, tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class Group:
    """Units of one kind that may be removed one by one.

    name: of the first weight in graph order. units: labels. slices: the (initializer, axis)
    every unit owns a slice of. kind: channels, heads, head_dim or hidden. exact: removing a
    unit whose output is zero changes nothing; no normalisation or product of activations
    counts it.
    """

    name: str
    units: tuple[int, ...]
    slices: tuple[tuple[str, int], ...]
    kind: str
    exact: bool


def unit_labels(ax: Axes) -> Labels:
    """Labels from 1 on in the order of the first index; 0 for what is no unit.

    A class that alone fills an axis cannot go, nor one that owns nothing stored.
    """
    roots = {name: tuple(ax.find(ids) for ids in axes) for name, axes in ax.ids.items()}
    free = np.zeros(len(ax.parent), bool)
    for name in ax.stored:
        for ids in roots[name]:
            free[ids] = True
    free[0] = False
    for axes in roots.values():
        for ids in axes:
            if len(ids) and ids[0] == ids[-1] and (ids == ids[0]).all():
                free[ids[0]] = False
    number = np.where(free, np.cumsum(free), 0)
    return {name: tuple(number[ids] for ids in axes) for name, axes in roots.items()}


def signatures(labels: Labels) -> np.ndarray:
    """A 64-bit hash per label of the (tensor, axis) it is on, with multiplicity.

    Sums of random numbers: two different multisets collide with probability 2^-64.
    """
    size = 1 + max((int(a.max(initial=0)) for axes in labels.values() for a in axes), default=0)
    total = np.zeros(size, np.uint64)
    rng = np.random.default_rng(0)
    for axes in labels.values():
        for ids in axes:
            key = rng.integers(1, 1 << 63, dtype=np.uint64)
            if ids.any():
                np.add.at(total, ids, key)
    return total


def find_groups(ax: Axes, labels: Labels) -> tuple[Group, ...]:
    """Groups in graph order: by the first node that reads one of their weights."""
    marks = signatures(labels)
    order: dict[str, None] = {}
    for node in ax.model.graph.node:
        order.update(dict.fromkeys(n for n in node.input if n in ax.stored))
    units: dict[int, list[int]] = {}
    for label in range(1, len(marks)):
        units.setdefault(int(marks[label]), []).append(label)
    first = {members[0]: mark for mark, members in units.items()}
    slices: dict[int, list[tuple[str, int]]] = {mark: [] for mark in units}
    for name in order:
        for axis, ids in enumerate(labels[name]):
            for label in np.unique(ids):
                if int(label) in first:
                    slices[first[int(label)]].append((name, axis))
    numbers = number_of(ax, labels)
    inexact = {int(v) for ids in ax.inexact for v in numbers[ax.find(ids)]}
    kinds = [
        (kind, {int(v) for ids in ax.kinds.get(kind, ()) for v in numbers[ax.find(ids)]})
        for kind in ("hidden", "head_dim", "heads")
    ]
    found, seen = [], dict[str, int]()
    position = {name: k for k, name in enumerate(order)}
    for mark, members in sorted(
        units.items(), key=lambda u: ([(position[n], a) for n, a in slices[u[0]]], u[1])
    ):
        name = slices[mark][0][0]
        seen[name] = seen.get(name, 0) + 1
        kind = next((k for k, of_kind in kinds if members[0] in of_kind), "channels")
        found.append(
            Group(
                name if seen[name] == 1 else f"{name}#{seen[name]}",
                tuple(members),
                tuple(slices[mark]),
                kind,
                members[0] not in inexact,
            )
        )
    return tuple(found)


def number_of(ax: Axes, labels: Labels) -> np.ndarray:
    """Label of each representative id."""
    numbers = np.zeros(len(ax.parent), np.int64)
    for name, axes in ax.ids.items():
        for ids, own in zip(axes, labels[name], strict=True):
            numbers[ax.find(ids)] = own
    numbers[0] = 0
    return numbers


def left_at_half(ax: Axes) -> float:
    """Parameters left if every group lost half of its units, rounded down.

    Groups of fewer than FINE units lose only half as much: two halves of a layer are no choice.
    """
    labels = unit_labels(ax)
    marks = signatures(labels)
    _, group, sizes = np.unique(marks, return_inverse=True, return_counts=True)
    size = sizes[group]
    lost = (size // 2) / size * np.where(size < FINE, 0.5, 1)
    lost[0] = 0
    total = 0.0
    for name, tensor in ax.stored.items():
        kept = float(np.prod(tensor.dims, dtype=np.int64))
        for ids in labels[name]:
            if len(ids):
                kept *= 1 - float(lost[ids].mean())
        total += kept
    return total
